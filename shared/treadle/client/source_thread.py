"""What a plain iterable yields, for an event loop: taken in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import TypeVar

_T = TypeVar("_T")


def on_a_loop(items: Iterable[_T] | AsyncIterable[_T]) -> Iterable[_T] | AsyncIterable[_T]:
    """The same items for code on a loop, which is not held up by an iterable that waits.

    Such a one may wait for a pipe, or for that very loop: it may ask the client whose stream it feeds.
    """
    if isinstance(items, AsyncIterable | list | tuple | str):
        return items
    return _taken_in_thread(items)


async def _taken_in_thread(items: Iterable[_T]) -> AsyncGenerator[_T, None]:
    """Each item is taken when it is asked for; raises what the iterable raises."""
    loop = asyncio.get_running_loop()
    asked: queue.SimpleQueue[asyncio.Future[tuple[_T] | None] | None] = queue.SimpleQueue()

    def settle(
        future: asyncio.Future[tuple[_T] | None], taken: tuple[_T] | None, error: BaseException | None
    ) -> None:
        if future.done():  # nobody waits any more
            return
        if error is None:
            future.set_result(taken)
        else:
            future.set_exception(error)

    iterator = iter(items)

    def take() -> None:
        while (future := asked.get()) is not None:
            taken, error = None, None
            try:
                taken = (next(iterator),)
            except StopIteration:
                pass
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, future, taken, error)

    # A daemon: one that waits for a pipe must not hold up the program's end.
    threading.Thread(target=take, name="treadle-requests", daemon=True).start()
    try:
        while True:
            future: asyncio.Future[tuple[_T] | None] = loop.create_future()
            asked.put(future)
            if (taken := await future) is None:
                return
            yield taken[0]
    finally:
        asked.put(None)
