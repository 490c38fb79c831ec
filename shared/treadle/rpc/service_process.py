"""A service as a process: its settings, logs, event loop and signals, and a word when it cannot start."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import ValidationError

from treadle.errors import TreadleError
from treadle.telemetry import configure_logging

Config = TypeVar("Config")


def run_service(
    name: str, configure: Callable[[], Config], serve: Callable[[Config, asyncio.Event], Awaitable[None]]
) -> None:
    """Runs `serve(configure(), stop)` on a fresh event loop; SIGTERM and SIGINT set `stop`.

    `serve` starts its server, awaits `stop`, and leaves in good order. What keeps the service from starting
    (a TreadleError, a setting that is none) ends the process with exit code 1 and a line on standard error.
    """
    configure_logging(name)

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(configure(), stop)

    try:
        asyncio.run(supervised())
    except ValidationError as error:
        sys.exit(f"treadle_{name}: {_wrong_settings(error)}")
    except TreadleError as error:
        sys.exit(f"treadle_{name}: {error.message}")


def _wrong_settings(error: ValidationError) -> str:
    """Each wrong setting by its variable; values stay out, as they may be secrets."""
    area = error.title.removesuffix("Config").upper()
    prefix = "TREADLE_" if area == "TRANSPORT" else f"TREADLE_{area}_"
    lines = []
    for wrong in error.errors(include_url=False, include_input=False, include_context=False):
        field = str(wrong["loc"][0]) if wrong["loc"] else ""
        variable = field if field.startswith("TREADLE_") or not field else prefix + field.upper()
        message = str(wrong["msg"]).removeprefix("Value error, ")
        lines.append(f"{variable}: {message}" if variable else message)
    return "; ".join(lines)
