"""A request's log, the token stream: entries with ids `<epoch>-<n>`, written by one owner at a time.

Redis refuses an id at or below a stream's top. Whoever takes a request writes a fence `<epoch>-0` of a
greater epoch, and from then on the entries of older owners are refused: that is all the locking there is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ResponseError

from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import TreadleError
from treadle.queue import codec
from treadle.queue.connection import redis_errors
from treadle.queue.keys import RequestKeys

READ_LIMIT = 1024
"""Entries of one log in one read."""


class EntryId(NamedTuple):
    """An entry's place: the owner's epoch, and the number of the entry in it (0 is the fence)."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"

    @classmethod
    def parse(cls, value: str | bytes) -> EntryId:
        """The id of "<epoch>-<n>"; raises ValueError."""
        epoch, _, number = (value.decode() if isinstance(value, bytes) else value).partition("-")
        return cls(int(epoch), int(number))


START = EntryId(0, 0)
"""Before every entry."""
QUEUED = EntryId(0, 1)
"""The entry with which the gateway makes the log."""


class LogEntry(NamedTuple):
    """An entry with its id."""

    id: EntryId
    entry: StreamEntry


@dataclass(frozen=True, slots=True)
class Log:
    """What a read found: `exists` is false when the log expired or never was."""

    exists: bool
    entries: list[LogEntry]

    @property
    def more(self) -> bool:
        """True when the read stopped at its limit: read again after the last entry."""
        return len(self.entries) >= READ_LIMIT


@redis_errors
async def read_logs(redis: Redis, after: Mapping[RequestKeys, EntryId]) -> dict[RequestKeys, Log]:
    """For each request its entries after an id (START: all), in one pipeline."""
    if not after:
        return {}
    pipe = redis.pipeline(transaction=False)
    for keys, last in after.items():
        pipe.exists(keys.log)
        pipe.xrange(keys.log, f"({last}", "+", count=READ_LIMIT)
    replies = await pipe.execute()
    return {
        keys: Log(bool(exists), log_entries(found))
        for keys, exists, found in zip(after, replies[::2], replies[1::2], strict=True)
    }


async def read_log(redis: Redis, keys: RequestKeys, after: EntryId = START) -> Log:
    """One request's entries after an id."""
    return (await read_logs(redis, {keys: after}))[keys]


def log_entries(reply: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> list[LogEntry]:
    """XRANGE's reply as entries."""
    return [LogEntry(EntryId.parse(id_), codec.from_fields(StreamEntry, values)) for id_, values in reply]


@dataclass(frozen=True, slots=True)
class Append:
    """An entry to write: bytes, so that a retry writes the very same."""

    keys: RequestKeys
    id: EntryId
    data: bytes


class Appended(enum.Enum):
    """What became of an entry."""

    WRITTEN = enum.auto()
    """Now, or by an earlier try whose reply was lost."""
    FENCED = enum.auto()
    """Another owner has the request: drop it silently."""
    CANCELLED = enum.auto()
    """A gateway has ended the request, or is about to: drop it silently."""
    VANISHED = enum.auto()
    """The log is gone and must stay so."""
    REFUSED = enum.auto()
    """For now (Redis is full): try the same entry again."""


@redis_errors
async def append(
    redis: Redis, appends: Sequence[Append], also: Callable[[Pipeline], None] | None = None
) -> list[Appended]:
    """Writes entries of different requests in one pipeline; `also` may add commands behind them.

    A request has one entry a call: were a first one refused and a second one written, the log would have
    a hole. Raises Unavailable when it is unknown what was written: append the same entries again.
    """
    pipe = redis.pipeline(transaction=False)
    for entry in appends:
        pipe.xadd(entry.keys.log, {codec.FIELD: entry.data}, id=str(entry.id), nomkstream=True)
    if also is not None:
        also(pipe)
    if not appends and not len(pipe):
        return []
    replies = (await pipe.execute(raise_on_error=False))[: len(appends)]
    outcomes = [_outcome(reply) for reply in replies]
    doubtful = [number for number, outcome in enumerate(outcomes) if outcome is None]
    if doubtful:
        tops = await read_tops(redis, [appends[number].keys for number in doubtful])
        for number, top in zip(doubtful, tops, strict=True):
            outcomes[number] = _judge(appends[number].id, top)
    return [outcome for outcome in outcomes if outcome is not None]


def _outcome(reply: object) -> Appended | None:
    """What a reply says; None where only the stream's top can tell."""
    if reply is None:
        return Appended.VANISHED
    if isinstance(reply, bytes):
        return Appended.WRITTEN
    if is_refused_id(reply):
        return None
    if isinstance(reply, ResponseError):
        return Appended.REFUSED
    raise reply if isinstance(reply, Exception) else TypeError(f"an unexpected reply to XADD: {reply!r}")


def is_refused_id(reply: object) -> bool:
    """Whether a stream refused an id at or below its top."""
    return isinstance(reply, ResponseError) and "equal or smaller" in str(reply)


def _judge(own: EntryId, top: Top | None) -> Appended:
    if top is None:
        return Appended.VANISHED
    # Both the retry of an own entry and a write past a fence are refused with the same words.
    if top.id.epoch == own.epoch:
        return Appended.WRITTEN
    return Appended.CANCELLED if top.is_end else Appended.FENCED


class Top(NamedTuple):
    """A log's last entry."""

    id: EntryId
    is_end: bool
    """Whether it is the request's end, or a gateway's fence, which comes before it."""


async def read_tops(redis: Redis, of: Sequence[RequestKeys]) -> list[Top | None]:
    """The last entry of each log; None where it is gone."""
    pipe = redis.pipeline(transaction=False)
    for keys in of:
        pipe.xrevrange(keys.log, "+", "-", count=1)
    replies: list[Any] = await pipe.execute()
    return [Top(EntryId.parse(reply[0][0]), _is_end(reply[0][1])) if reply else None for reply in replies]


def _is_end(values: Mapping[bytes, bytes]) -> bool:
    try:
        entry = codec.from_fields(StreamEntry, values)
    except TreadleError:
        # A later schema's, or damaged: whoever reads the log will say so.
        return False
    return entry.HasField("terminal") or (entry.HasField("fence") and not entry.fence.consumer)
