"""Follows the logs of all requests of this gateway: one blocking reader, one pipeline a round.

Workers push news onto this gateway's own list, what they wrote along with them. One task pops them and
hands them to their subscriptions; another reads the logs that must be read, once their clients wait: of
entries that were missed, or too large to travel. What Redis lost of the news, a sweep over all who wait makes
good.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from redis.asyncio import Redis

from treadle.errors import Internal, ResourceExhausted, TreadleError, Unavailable
from treadle.queue import dirty
from treadle.queue.keys import ATTACHED_MS, RENEWALS, RequestKeys
from treadle.queue.log import START, EntryId, read_logs
from treadle.queue.submission import renew_attached
from treadle_gateway.subscriptions import Subscription, Subscriptions

logger = logging.getLogger(__name__)

BLOCK_S = 1.0
SWEEP_S = 1.5
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class LogFollower:
    """Owns the tasks that read; `start` before the first subscription, `close` at the end."""

    def __init__(
        self,
        redis: Redis,
        blocking: Redis,
        gateway_id: str,
        *,
        patience_s: float,
        attached_ms: int = ATTACHED_MS,
    ) -> None:
        """`blocking` is a client for blocking reads; waits outlast a lost Redis by `patience_s`, and clients
        a gateway that died by `attached_ms`."""
        self._redis = redis
        self._blocking = blocking
        self._gateway_id = gateway_id
        self._patience_s = patience_s
        self.attached_ms = attached_ms
        self._subscriptions = Subscriptions()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: TreadleError | None = None
        self.entries_read = 0
        """Entries that were read, of all logs."""
        self.entries_heard = 0
        """Entries that came with news."""

    def __len__(self) -> int:
        return len(self._subscriptions)

    def start(self) -> None:
        """Starts the tasks."""
        loops = {
            "news": self._pop(),
            "reader": self._read(),
            "sweep": self._sweep(),
            "attached": self._renew(),
        }
        self._tasks = [asyncio.create_task(loop, name=f"follower-{name}") for name, loop in loops.items()]

    def subscribe(self, request: RequestKeys, after: EntryId = START, *, news: bool = True) -> Subscription:
        """Follows a request after an entry; call it before whatever makes the log grow.

        `news`: whether the log may hold more than that already.
        """
        if self._closing is not None:
            raise self._closing
        return self._subscriptions.add(request, self._read_soon, after, news=news)

    def unsubscribe(self, subscription: Subscription) -> int:
        """Ends a subscription; returns how many others of this gateway follow its request."""
        return self._subscriptions.remove(subscription)

    def follows(self, request: RequestKeys) -> bool:
        """Whether somebody here follows the request."""
        return any(True for _ in self._subscriptions.of([request]))

    @property
    def leaving(self) -> bool:
        """Whether the gateway has ended its streams itself."""
        return self._closing is not None

    def end_all(self, error: TreadleError) -> None:
        """Fails every wait, now and later ones: the gateway is leaving."""
        self._closing = error
        self._read_soon()

    def _read_soon(self) -> None:
        if self._closing is None:
            self._wake.set()
            return
        for subscription in self._subscriptions:
            subscription.fail(self._closing)

    async def close(self) -> None:
        """Ends the tasks, after `end_all`."""
        # Cancelling alone does not do: a library may swallow it (see Deadline.bound).
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pop(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while self._closing is None:
            try:
                news = await dirty.pop(self._blocking, self._gateway_id, block_s=BLOCK_S)
            except Exception as error:
                if not isinstance(error, TreadleError):
                    logger.exception("the news cannot be read")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = _FIRST_PAUSE_S
            for one in news:
                self.entries_heard += one.entry is not None
                for subscription in self._subscriptions.of([one.request]):
                    subscription.hear(one)
                    if subscription.wants_reading:
                        self._wake.set()

    async def _sweep(self) -> None:
        while self._closing is None:
            await asyncio.sleep(SWEEP_S)
            self._mark(self._subscriptions)

    def _mark(self, subscriptions: Iterable[Subscription]) -> None:
        for subscription in subscriptions:
            subscription.mark()
        self._wake.set()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        away_since: float | None = None
        pause_s = _FIRST_PAUSE_S
        while self._closing is None:
            await self._wake.wait()
            self._wake.clear()
            wanted = [one for one in self._subscriptions if one.wants_reading]
            try:
                await self._read_round(wanted)
            except (Unavailable, ResourceExhausted) as error:
                away_since = away_since or loop.time()
                if loop.time() - away_since > self._patience_s:
                    for subscription in wanted:
                        subscription.fail(error)
                self._mark(wanted)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except Exception:
                await self._read_each(wanted)
            else:
                away_since, pause_s = None, _FIRST_PAUSE_S

    async def _read_round(self, wanted: list[Subscription]) -> None:
        after: dict[RequestKeys, EntryId] = {}
        for subscription in wanted:
            subscription.begin_reading()
            request = subscription.request
            after[request] = min(subscription.after, after.get(request, subscription.after))
        logs = await read_logs(self._redis, after)
        self.entries_read += sum(len(log.entries) for log in logs.values())
        for subscription in wanted:
            subscription.give(logs[subscription.request])
            if subscription.wants_reading:
                self._wake.set()

    async def _read_each(self, wanted: list[Subscription]) -> None:
        """One log is damaged, and its decoding failed the round: find whose it is."""
        for subscription in wanted:
            try:
                await self._read_round([subscription])
            except Exception as error:
                logger.warning(
                    "a log cannot be read",
                    exc_info=True,
                    extra={"request_id": subscription.request.request_id},
                )
                known = error if isinstance(error, TreadleError) else Internal("the log cannot be read")
                subscription.fail(known)

    async def _renew(self) -> None:
        while self._closing is None:
            await asyncio.sleep(self.attached_ms / 1000 / RENEWALS)
            try:
                await renew_attached(
                    self._redis,
                    self._gateway_id,
                    self._subscriptions.requests,
                    attached_ms=self.attached_ms,
                )
            except TreadleError:
                logger.warning("could not say whose clients are attached", exc_info=True)
