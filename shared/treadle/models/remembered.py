"""What the registry said of names: taken for granted for a while, and for longer while it is away."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from treadle.errors import DeadlineExceeded, Unavailable
from treadle.single_flight import SingleFlight

logger = logging.getLogger(__name__)

V = TypeVar("V")


class RememberedNames(Generic[V]):
    """Names to what they mean. Those who ask for one name at once share one question."""

    def __init__(
        self,
        ask: Callable[[str], Awaitable[V]],
        *,
        fresh_s: float,
        max_names: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` asks the registry; `fresh_s` is how long its answer is not asked for again."""
        self._ask = ask
        self._fresh_s = fresh_s
        self._max_names = max_names
        self._clock = clock
        self._known: OrderedDict[str, tuple[V, float]] = OrderedDict()
        self._asking: SingleFlight[str, V] = SingleFlight()

    @property
    def names(self) -> list[str]:
        """What is remembered, the name that was asked for last at the end."""
        return list(self._known)

    async def get(self, name: str) -> V:
        """What the name means.

        Raises what `ask` raises; Unavailable and DeadlineExceeded only for a name that is not remembered.
        """
        known = self._known.get(name)
        if known is not None and self._clock() < known[1]:
            self._known.move_to_end(name)
            return known[0]
        return await self._asking.run(name, lambda: self._ask_again(name))

    def forget(self, name: str) -> None:
        """The registry is there, and says otherwise now."""
        self._known.pop(name, None)

    async def close(self) -> None:
        """Calls off what is being asked."""
        await self._asking.close()

    async def _ask_again(self, name: str) -> V:
        try:
            value = await self._ask(name)
        except (Unavailable, DeadlineExceeded):
            known = self._known.get(name)
            if known is None:
                raise
            logger.warning("the registry is away; what it said last is used", extra={"model": name})
            value = known[0]
        # An old answer too: not to ask, and wait, for every request while the registry is away.
        self._known[name] = (value, self._clock() + self._fresh_s)
        self._known.move_to_end(name)
        while len(self._known) > self._max_names:
            self._known.popitem(last=False)
        return value
