"""What lies in Redis, seen from outside: who has a request, what waits, what was left behind."""

from __future__ import annotations

from collections.abc import Iterable

from redis.asyncio import Redis
from waiting import until

from treadle.queue import keys
from treadle.queue.keys import RequestKeys
from treadle.queue.log import LogEntry, log_entries


class QueueView:
    """Looks, and changes nothing."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    async def log(self, request: RequestKeys) -> list[LogEntry]:
        """All of a request's log."""
        return log_entries(await self.redis.xrange(request.log))

    async def fences(self, request: RequestKeys) -> list[str]:
        """Who took the request, one after the other: consumers; "" is a gateway that ended it."""
        return [entry.fence.consumer for _, entry in await self.log(request) if entry.HasField("fence")]

    async def has_ended(self, request: RequestKeys) -> bool:
        """Whether its end is written."""
        return any(entry.HasField("terminal") for _, entry in await self.log(request))

    async def num_tokens(self, request: RequestKeys) -> int:
        """Tokens that were written."""
        return sum(len(entry.tokens.token_ids) for _, entry in await self.log(request))

    async def owner(self, request: RequestKeys) -> str:
        """The worker that has it, by name; "" where none does."""
        value = await self.redis.get(request.owner)
        return "" if value is None else worker_name(value.decode())

    async def owned(self, requests: Iterable[RequestKeys]) -> dict[RequestKeys, str]:
        """The owners of those that have one and have not ended."""
        return {
            request: owner
            for request in requests
            if (owner := await self.owner(request)) and not await self.has_ended(request)
        }

    async def lanes(self) -> list[str]:
        """Every lane."""
        return [name.decode() for name in await self.redis.keys("treadle:lane:*")]

    async def num_entries(self) -> int:
        """Entries of all lanes, waiting and running."""
        return sum([await self.redis.xlen(lane) for lane in await self.lanes()])

    async def pending(self) -> dict[str, int]:
        """How many entries each consumer holds, by its name."""
        found: dict[str, int] = {}
        for lane in await self.lanes():
            for row in await self.redis.xinfo_consumers(lane, keys.GROUP):
                if row["pending"]:
                    name = worker_name(row["name"].decode())
                    found[name] = found.get(name, 0) + row["pending"]
        return found

    async def until_empty(self, timeout_s: float = 15.0) -> float:
        """Waits until no lane has an entry, and nobody holds one; returns how many seconds that took."""

        async def empty() -> bool:
            return not await self.num_entries() and not await self.pending()

        return await until(empty, "every lane is empty, and nobody holds an entry", timeout_s)


def worker_name(consumer: str) -> str:
    """A consumer's name without its boot nonce."""
    return consumer if consumer == keys.NOBODY else consumer.rpartition("-")[0]
