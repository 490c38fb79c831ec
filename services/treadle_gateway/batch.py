"""Many items on one stream, answered as each is ready or in their order, so many at once and no more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batch(Generic[Item, Answer]):
    """Reads an item only when fewer than `limit` are unanswered: a client that sends faster is held back.

    An answer counts as given when the next one is asked for, so a client that does not read holds back too.
    """

    def __init__(
        self,
        items: AsyncIterator[Item],
        answer: Callable[[int, Item], Awaitable[Answer]],
        *,
        limit: int,
        ordered: bool = False,
    ) -> None:
        """`answer` gets an item's place in the stream, from 0, and the item; it turns errors into answers.

        `ordered`: the answers come in the order of the items. One that is ready before its turn waits, and is
        among the `limit`.
        """
        self._items = items
        self._answer = answer
        self._limit = limit
        self._ordered = ordered
        self._reading: asyncio.Task[Item] | None = None
        self._running: deque[asyncio.Task[Answer]] = deque()
        self._count = 0

    async def answers(self) -> AsyncIterator[Answer]:
        """Each answer when it is ready, or when it is its turn."""
        try:
            more = True
            while more or self._running:
                if more and self._reading is None and len(self._running) < self._limit:
                    self._reading = asyncio.ensure_future(self._next())
                due = self._due()
                waiting: set[asyncio.Task[Any]] = {*due, *filter(None, [self._reading])}
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._reading in done:
                    more = self._start(self._reading)
                for task in due:
                    if task in done:
                        yield task.result()
                        self._running.remove(task)
        finally:
            self.close()

    def _due(self) -> list[asyncio.Task[Answer]]:
        """Those of which any may be answered next."""
        return list(self._running)[: 1 if self._ordered else None]

    async def _next(self) -> Item:
        return await anext(self._items)

    def _start(self, reading: asyncio.Task[Item]) -> bool:
        """Starts on the item that was read; False at the stream's end."""
        self._reading = None
        try:
            item = reading.result()
        except StopAsyncIteration:
            return False
        self._running.append(asyncio.ensure_future(self._answer_one(self._count, item)))
        self._count += 1
        return True

    async def _answer_one(self, index: int, item: Item) -> Answer:
        return await self._answer(index, item)

    def close(self) -> None:
        """Gives up what is unanswered: the client is gone."""
        for task in (*self._running, *filter(None, [self._reading])):
            task.cancel()
