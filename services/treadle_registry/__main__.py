"""`python -m treadle_registry`: the registry as a process."""

from __future__ import annotations

from treadle.process import leave_on_sigterm


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    leave_on_sigterm()
    from treadle.rpc import run_service
    from treadle_registry.config import RegistryConfig
    from treadle_registry.serving import serve

    run_service("registry", RegistryConfig, serve)


if __name__ == "__main__":
    main()
