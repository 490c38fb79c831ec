"""`python -m treadle_gateway`: the gateway as a process."""

from __future__ import annotations

from functools import partial

from treadle.rpc import run_service
from treadle.telemetry import configure_logging
from treadle_gateway.config import GatewayConfig
from treadle_gateway.gateway import serve


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    configure_logging("gateway")
    run_service(partial(serve, GatewayConfig()))


if __name__ == "__main__":
    main()
