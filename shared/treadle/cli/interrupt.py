"""Runs a command's coroutine so that Ctrl-C and SIGTERM end it in good order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run_until_interrupted(main: Coroutine[Any, Any, _T]) -> _T:
    """Runs `main` on a fresh event loop.

    SIGINT and SIGTERM cancel it, once more each time they come; when it has ended so, the command exits
    with 128 and the signal's number.
    """
    received: list[int] = []

    async def supervised() -> _T:
        task = asyncio.current_task()
        assert task is not None

        def interrupt(number: int) -> None:
            received.append(number)
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt, number)
        return await main

    try:
        return asyncio.run(supervised())
    except asyncio.CancelledError:
        if not received:
            raise
        raise SystemExit(128 + received[0]) from None
