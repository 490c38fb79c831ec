"""`python -m treadle_gateway`: the gateway as a process."""

from __future__ import annotations

from treadle.process import leave_on_sigterm


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    leave_on_sigterm()
    from treadle.rpc import run_service
    from treadle_gateway.config import GatewayConfig
    from treadle_gateway.gateway import serve

    run_service("gateway", GatewayConfig, serve)


if __name__ == "__main__":
    main()
