"""An event loop in a thread of its own, for code that has none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")
_UNWIND_S = 2.0


class LoopThread:
    """An event loop in a thread; `run` waits for a coroutine, and cancels it when interrupted."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="treadle-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Waits for the coroutine's result, or its error; an interrupt cancels it and is raised."""
        outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
        ended = threading.Event()
        task: asyncio.Task[None] | None = None

        async def finish() -> None:
            try:
                outcome.set_result(await coroutine)
            except BaseException as error:
                outcome.set_exception(error)

        def start() -> None:
            nonlocal task
            task = self._loop.create_task(finish())
            task.add_done_callback(close)

        def stop() -> None:
            if task is None:
                close()
            else:
                task.cancel()

        def close(_: object = None) -> None:
            coroutine.close()  # one that was cancelled before its first step never ran
            ended.set()

        # An interrupt may come at any instruction, also as the loop is being told to start.
        try:
            self._loop.call_soon_threadsafe(start)
            return outcome.result()
        except BaseException:
            # An interrupted generator must have unwound before anybody closes it.
            self._loop.call_soon_threadsafe(stop)
            ended.wait(_UNWIND_S)
            raise

    def close(self) -> None:
        """Ends the loop and the thread."""
        if self._loop.is_closed():
            return
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def iterate(self, items: AsyncGenerator[_T, None]) -> Iterator[_T]:
        """What an asynchronous generator yields; it is closed when this one is."""

        async def following() -> tuple[_T] | None:
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return None

        try:
            while (item := self.run(following())) is not None:
                yield item[0]
        finally:
            self.run(items.aclose())
