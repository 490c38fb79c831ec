"""Waits for something to come true."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


async def until(
    condition: Callable[[], Awaitable[bool] | bool], what: str, timeout_s: float = 30.0, every_s: float = 0.01
) -> float:
    """Looks every `every_s` until the condition holds; returns the seconds it took, or fails with `what`."""
    began = time.monotonic()
    while True:
        found = condition()
        if await found if inspect.isawaitable(found) else found:
            return time.monotonic() - began
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(every_s)
