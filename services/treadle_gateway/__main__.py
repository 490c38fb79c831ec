"""`python -m treadle_gateway`: the gateway as a process."""

from __future__ import annotations

from treadle.rpc import run_service
from treadle_gateway.config import GatewayConfig
from treadle_gateway.gateway import serve


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    run_service("gateway", GatewayConfig, serve)


if __name__ == "__main__":
    main()
