"""Threads for the work that takes processor time, so that the event loop stays free and nobody starves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from treadle.errors import ResourceExhausted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece(Generic[T]):
    """Work on an input of `size` bytes, in one go."""

    work: Callable[[], T]
    size: int


class Lanes:
    """Two lanes: several threads for ordinary work, one for large work.

    The library gives up the interpreter's lock while it encodes, and a large text may take seconds: on a
    lane of its own it holds up only its like. What waits is bounded on both.
    """

    def __init__(self, *, threads: int, large_bytes: int, max_waiting: int, max_waiting_large: int) -> None:
        self._large_bytes = large_bytes
        self._ordinary = _Lane("tokenizer", threads, max_waiting)
        self._large = _Lane("tokenizer-large", 1, max_waiting_large)

    async def run(self, work: Callable[[], T], *, size: int) -> T:
        """The result of `work`, whose input has `size` bytes; raises ResourceExhausted when the lane is full.

        Work that nobody waits for any more is dropped if it has not begun.
        """
        return await self._lane(size).run(work)

    async def run_all(self, pieces: Sequence[Piece[T]]) -> list[T]:
        """The results of the pieces of one request, in their order.

        At most as many of them as a lane has threads wait in it at once, so that requests of many pieces and
        requests of one take turns. The first error ends the others; raises ResourceExhausted as `run`.
        """
        results: dict[int, T] = {}
        waiting: dict[_Lane, list[int]] = {}
        for number, piece in enumerate(pieces):
            waiting.setdefault(self._lane(piece.size), []).append(number)

        async def go_through(lane: _Lane, numbers: Iterator[int]) -> None:
            for number in numbers:
                results[number] = await lane.run(pieces[number].work)

        try:
            async with asyncio.TaskGroup() as group:
                for lane, numbers in waiting.items():
                    shared = iter(numbers)
                    for _ in range(min(lane.threads, len(numbers))):
                        group.create_task(go_through(lane, shared))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [results[number] for number in range(len(pieces))]

    def close(self) -> None:
        """Waits for what runs, drops what waits."""
        self._ordinary.close()
        self._large.close()

    def _lane(self, size: int) -> _Lane:
        return self._ordinary if size < self._large_bytes else self._large


class _Lane:
    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.threads = threads
        self._most = threads + max_waiting
        self._held = 0

    async def run(self, work: Callable[[], T]) -> T:
        if self._held >= self._most:
            raise ResourceExhausted(
                "too many requests wait to be tokenised", reason="TOKENIZER_BUSY", retry_after_s=1.0
            )
        self._held += 1
        future = self._pool.submit(work)
        loop = asyncio.get_running_loop()
        # Not when the caller leaves, but when the thread is done with it: a thread cannot be called off.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        return await asyncio.wrap_future(future)

    def _release(self) -> None:
        self._held -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
