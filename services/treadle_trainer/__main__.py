"""`python -m treadle_trainer`: the trainer as a process."""

from __future__ import annotations

from treadle.process import leave_on_sigterm


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    leave_on_sigterm()
    from treadle.rpc import run_service
    from treadle_trainer.config import TrainerConfig
    from treadle_trainer.server import serve

    run_service("trainer", TrainerConfig, serve)


if __name__ == "__main__":
    main()
