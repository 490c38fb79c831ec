"""A bounded cache of things that take long to load; those who ask at once wait for one loading."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LoadOnce(Generic[K, V]):
    """Keeps the `max_entries` values that were asked for last. One event loop owns it."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._values: OrderedDict[K, V] = OrderedDict()
        self._loading: dict[K, asyncio.Task[V]] = {}
        self.num_loads = 0
        """Loadings that were begun."""

    async def get(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """The value of `key`, from `load` where it is not there; what `load` raises is not kept.

        A caller that is cancelled leaves the loading to the others.
        """
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        task = self._loading.get(key)
        if task is None:
            self.num_loads += 1
            task = self._loading[key] = asyncio.create_task(self._load(key, load))
            task.add_done_callback(look_at_error)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Calls off what is still being loaded."""
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        try:
            value = await load()
        finally:
            del self._loading[key]
        self._values[key] = value
        while len(self._values) > self._max_entries:
            self._values.popitem(last=False)
        return value


def look_at_error(task: asyncio.Task[V]) -> None:
    """Keeps asyncio from complaining of an error that every caller left before it came."""
    if not task.cancelled():
        task.exception()
