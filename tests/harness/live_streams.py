"""Several streams that run while something happens to the suite."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from client_record import Record, Told, attach, start

from treadle.api.inference.v1 import generation_pb2
from treadle.queue.keys import RequestKeys


def keys_of(asked: generation_pb2.Generation) -> RequestKeys:
    return RequestKeys(asked.tenant or "default", asked.request_id)


def renamed(asked: generation_pb2.Generation, prefix: str) -> generation_pb2.Generation:
    """The same request under another id."""
    copy = generation_pb2.Generation()
    copy.CopyFrom(asked)
    copy.request_id = f"{prefix}-{asked.request_id}"
    return copy


@dataclass
class Live:
    """Running streams of a crowd."""

    asked: list[generation_pb2.Generation]
    records: list[Record]
    tasks: list[asyncio.Task[Record]]

    @property
    def keys(self) -> list[RequestKeys]:
        return [keys_of(one) for one in self.asked]

    @property
    def num_tokens(self) -> int:
        return sum(record.num_tokens for record in self.records)

    async def until_tokens(self, count: int) -> None:
        while self.num_tokens < count:
            assert not all(task.done() for task in self.tasks), f"all ended before {count} tokens"
            await asyncio.sleep(0.002)

    async def until_all_begun(self) -> None:
        """Until each was answered something: its request is in Redis."""
        while not all(record.chunks for record in self.records):
            assert not all(task.done() for task in self.tasks), "all ended before"
            await asyncio.sleep(0.002)


def begin(stubs: Sequence, asked: list[generation_pb2.Generation]) -> Live:
    """Starts a stream for each request, the gateways taking turns."""
    records = [Record() for _ in asked]
    tasks = [
        asyncio.create_task(record.listen(start(stubs[number % len(stubs)], one)))
        for number, (record, one) in enumerate(zip(records, asked, strict=True))
    ]
    return Live(asked, records, tasks)


async def check_whole(live: Live, expected: list[Told], stubs: Sequence) -> None:
    """Every stream ended with its answer, and the log still says what its client was told."""
    await asyncio.gather(*live.tasks)
    for number, (one, record, told) in enumerate(zip(live.asked, live.records, expected, strict=True)):
        assert record.told() == told, one.request_id
        again = await Record().listen(attach(stubs[(number + 1) % len(stubs)], one))
        assert again.error is None
        assert again.chunks == record.chunks, f"{one.request_id}: what was delivered has changed"
