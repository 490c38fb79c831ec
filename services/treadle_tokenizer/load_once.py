"""A bounded cache of things that take long to load; those who ask at once wait for one loading."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from treadle.single_flight import SingleFlight

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LoadOnce(Generic[K, V]):
    """Keeps the `max_entries` values that were asked for last. One event loop owns it."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._values: OrderedDict[K, V] = OrderedDict()
        self._loading: SingleFlight[K, V] = SingleFlight()

    @property
    def num_loads(self) -> int:
        """Loadings that were begun."""
        return self._loading.num_started

    async def get(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """The value of `key`, from `load` where it is not there; what `load` raises is not kept.

        A caller that is cancelled leaves the loading to the others.
        """
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        return await self._loading.run(key, lambda: self._load(key, load))

    async def close(self) -> None:
        """Calls off what is still being loaded."""
        await self._loading.close()

    async def _load(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        value = await load()
        self._values[key] = value
        while len(self._values) > self._max_entries:
            self._values.popitem(last=False)
        return value
