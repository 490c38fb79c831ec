"""Blocking calls off the event loop, one after another for whoever makes them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

from treadle.errors import Cancelled

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def run_blocking(
    executor: Executor | None, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    """Runs `call` in a thread; None: the loop's own threads.

    A thread cannot be called off: a caller that is cancelled waits for its end before the cancellation goes
    on, so that what the call works on can be closed afterwards. Give it little work at a time.
    """
    running = asyncio.get_running_loop().run_in_executor(executor, lambda: call(*args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()
        raise


async def acquire(executor: Executor | None, call: Callable[[], _T], release: Callable[[_T], None]) -> _T:
    """What `call` gives, as by `run_blocking`; a caller that was cancelled meanwhile has it released."""
    loop = asyncio.get_running_loop()
    running = loop.run_in_executor(executor, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled() and running.exception() is None:
            await asyncio.wait([loop.run_in_executor(executor, release, running.result())])
        raise


async def run_heard(call: Callable[[Callable[[int], None]], _T]) -> _T:
    """Runs a long `call` in a thread; the function that it is given, and calls now and then, raises Cancelled
    once the caller was cancelled."""
    stop = threading.Event()

    def heard(_: int) -> None:
        if stop.is_set():
            raise Cancelled("it was called off")

    running = asyncio.get_running_loop().run_in_executor(None, call, heard)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()
        raise
