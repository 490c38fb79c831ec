"""`python -m treadle_registry`: the registry, until SIGTERM."""

from __future__ import annotations

import asyncio
import sys

from treadle.errors import TreadleError
from treadle.rpc import run_service
from treadle.telemetry import configure_logging
from treadle_registry.config import RegistryConfig
from treadle_registry.serving import serving


async def _main(stop: asyncio.Event) -> None:
    async with serving(RegistryConfig()):
        await stop.wait()


def main() -> None:
    """Serves until it is told to stop; exits 1 with one line where it cannot."""
    configure_logging("registry")
    try:
        run_service(_main)
    except TreadleError as error:
        sys.exit(f"treadle_registry: {error.message}")


if __name__ == "__main__":
    main()
