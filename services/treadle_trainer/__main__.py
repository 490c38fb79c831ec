"""`python -m treadle_trainer`: the trainer as a process."""

from __future__ import annotations

from functools import partial

from treadle.rpc import run_service
from treadle.telemetry import configure_logging
from treadle_trainer.config import TrainerConfig
from treadle_trainer.server import serve


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    configure_logging("trainer")
    run_service(partial(serve, TrainerConfig()))


if __name__ == "__main__":
    main()
