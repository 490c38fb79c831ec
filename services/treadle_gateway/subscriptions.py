"""One reader of one request's log, and the table of all of them.

A subscription holds a position, whether there may be news, and a few entries that came with them: all others
are read when its client is ready for them, so that nothing piles up for a client that does not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from treadle.errors import TreadleError, Unavailable
from treadle.queue.dirty import News
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, EntryId, Log, LogEntry

MAX_HELD = 4
"""Entries that came with news and wait for their client; each of at most `dirty.INLINE_BYTES`."""


class Subscription:
    """A position in a request's log, with at most one wait for what comes after it."""

    def __init__(
        self, request: RequestKeys, after: EntryId, wake: Callable[[], None], *, news: bool = True
    ) -> None:
        """`news`: whether there may be entries after `after` now."""
        self.request = request
        self.after = after
        """The last entry that was handed out, or is held."""
        self._wake = wake
        self._news = news
        self._held: list[LogEntry] = []
        self._waiter: asyncio.Future[list[LogEntry]] | None = None

    async def next(self) -> list[LogEntry]:
        """The next entries, at least one, in their order.

        Raises Unavailable (REQUEST_LOST) when the log is gone, and what the follower failed with.
        """
        if self._held:
            entries, self._held = self._held, []
            return entries
        self._waiter = asyncio.get_running_loop().create_future()
        if self._news:
            self._wake()
        try:
            return await self._waiter
        finally:
            self._waiter = None

    @property
    def wants_reading(self) -> bool:
        """Whether its client waits, and there may be something to read."""
        return self._news and self.waiting

    @property
    def waiting(self) -> bool:
        """Whether its client waits for entries."""
        return self._waiter is not None and not self._waiter.done()

    def mark(self) -> None:
        """There may be news."""
        self._news = True

    def hear(self, news: News) -> None:
        """Takes the news' entry where it follows what is there; else the log is to be read."""
        entry = news.entry
        if entry is not None and entry.id <= self.after:
            return
        if entry is None or news.previous > self.after or len(self._held) >= MAX_HELD:
            self._news = True
            return
        self.after = entry.id
        if self._waiter is not None and self.waiting:
            self._waiter.set_result([entry])
        else:
            self._held.append(entry)

    def begin_reading(self) -> None:
        """The log is about to be read: news that come from here on are news again."""
        self._news = False

    def give(self, log: Log) -> None:
        """Takes what a read found."""
        entries = [entry for entry in log.entries if entry.id > self.after]
        self._news = self._news or log.more
        if not log.exists:
            self.fail(
                Unavailable(
                    "the request's log is gone: Redis lost it, or its time is over; send the request again",
                    reason="REQUEST_LOST",
                    retry_after_s=1.0,
                )
            )
        elif entries and self._waiter is not None and self.waiting:
            self.after = entries[-1].id
            self._waiter.set_result(entries)
        elif entries:
            self._news = True

    def fail(self, error: TreadleError) -> None:
        """Ends the wait with an error; there may be news all the same."""
        self._news = True
        if self._waiter is not None and self.waiting:
            self._waiter.set_exception(error)


class Subscriptions:
    """All subscriptions of this gateway, by request; several may follow one."""

    def __init__(self) -> None:
        self._by_request: dict[RequestKeys, set[Subscription]] = {}

    def add(
        self,
        request: RequestKeys,
        wake: Callable[[], None],
        after: EntryId = START,
        *,
        news: bool = True,
    ) -> Subscription:
        """A new subscription after an entry; `news` as Subscription says."""
        subscription = Subscription(request, after, wake, news=news)
        self._by_request.setdefault(request, set()).add(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> int:
        """Forgets a subscription; returns how many others follow its request."""
        others = self._by_request.get(subscription.request, set())
        others.discard(subscription)
        if not others:
            self._by_request.pop(subscription.request, None)
        return len(others)

    def __len__(self) -> int:
        return sum(map(len, self._by_request.values()))

    def __iter__(self) -> Iterator[Subscription]:
        for followers in list(self._by_request.values()):
            yield from list(followers)

    def of(self, requests: Iterable[RequestKeys]) -> Iterator[Subscription]:
        """The subscriptions of these requests."""
        for request in requests:
            yield from list(self._by_request.get(request, ()))

    @property
    def requests(self) -> list[RequestKeys]:
        """Every request that somebody follows."""
        return list(self._by_request)
