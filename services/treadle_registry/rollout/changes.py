"""Changes of aliases and deployments, for whoever watches them.

Of each name only the last change is kept, so that a watcher who reads slowly, or not at all, costs nothing:
when it comes back it is told what is different now, once a name. What was deleted is remembered for a while;
who has missed more than that is told everything anew.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from treadle.errors import ResourceExhausted, Unavailable
from treadle_registry.catalog.aliases import Alias
from treadle_registry.rollout.status import DeploymentView

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """What a name means now; None: it was deleted."""

    kind: Literal["alias", "deployment"]
    name: str
    value: Alias | DeploymentView | None


@dataclass(frozen=True, slots=True)
class Notice:
    """What a watcher is told: a change, or where the whole state begins and ends, or that nothing is new.

    Its version is the place to go on from; empty while the whole state is being told.
    """

    version: str
    content: Change | Literal["reset", "complete", "alive"]


class ChangeLog:
    """The last change of every name in the order in which they came. One event loop owns it."""

    def __init__(self, *, kept_deletions: int = 1000, max_watchers: int = 1000, alive_every_s: float = 30.0):
        self._boot = secrets.token_hex(4)
        self._last: OrderedDict[tuple[str, str], tuple[int, Change]] = OrderedDict()
        self._deleted: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._kept_deletions, self._max_watchers = kept_deletions, max_watchers
        self._alive_every_s = alive_every_s
        self._number = 0
        self._floor = 0
        """Who has seen less than this must be told everything."""
        self._news = asyncio.Event()
        self._closed = False
        self.watchers = 0
        """How many watch now."""

    def add(self, changes: Iterable[Change]) -> None:
        """Takes changes in, in order, and wakes whoever watches."""
        for change in changes:
            self._number += 1
            key: tuple[str, str] = (change.kind, change.name)
            self._last.pop(key, None)
            self._deleted.pop(key, None)
            self._last[key] = self._number, change
            if change.value is None:
                self._deleted[key] = self._number
        while len(self._deleted) > self._kept_deletions:
            key, self._floor = self._deleted.popitem(last=False)
            del self._last[key]
        self._wake()

    def close(self) -> None:
        """Ends every watch."""
        self._closed = True
        self._wake()

    async def watch(self, version: str) -> AsyncGenerator[Notice, None]:
        """Changes after `version`, for ever; where that is unknown or too old, the whole state first.

        Raises Unavailable (SHUTTING_DOWN) at the registry's end, and ResourceExhausted (TOO_MANY_WATCHERS).
        """
        if self.watchers >= self._max_watchers:
            raise ResourceExhausted(
                f"{self.watchers} watch already; ask again later, or watch once for all that need it",
                reason="TOO_MANY_WATCHERS",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.watchers += 1
        try:
            seen = self._read(version)
            while True:
                if self._closed:
                    raise Unavailable(
                        "the registry is shutting down; watch again",
                        reason="SHUTTING_DOWN",
                        retry_after_s=_RETRY_AFTER_S,
                    )
                if seen is None or seen < self._floor:
                    yield Notice("", "reset")
                    state, seen = self._after(0), self._number
                    for _, change in state:
                        if change.value is not None:
                            yield Notice("", change)
                    yield Notice(self._version(seen), "complete")
                    continue
                for number, change in self._after(seen):
                    yield Notice(self._version(number), change)
                    seen = number
                if not self._closed and seen == self._number and not await self._is_news():
                    yield Notice(self._version(seen), "alive")
        finally:
            self.watchers -= 1

    def _after(self, number: int) -> Sequence[tuple[int, Change]]:
        """What has changed after `number`, the oldest first."""
        found = []
        for entry in reversed(self._last.values()):
            if entry[0] <= number:
                break
            found.append(entry)
        return found[::-1]

    async def _is_news(self) -> bool:
        """Waits for the next change; false when it is time to say that nothing is new."""
        try:
            await asyncio.wait_for(self._news.wait(), self._alive_every_s)
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _version(self, number: int) -> str:
        return f"{self._boot}.{number}"

    def _read(self, version: str) -> int | None:
        """The number of a version that was given out here; None for any other."""
        boot, _, number = version.partition(".")
        if boot != self._boot or len(number) > 18 or not (number.isascii() and number.isdecimal()):
            return None
        return int(number) if int(number) <= self._number else None
