"""The entries of Redis as bytes: versioned protobuf messages of queue.proto, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError
from redis.typing import EncodableT, FieldT

from treadle.api.worker.v1.queue_pb2 import ControlEntry, Heartbeat, LaneEntry, News, StreamEntry
from treadle.errors import DataLoss, FailedPrecondition
from treadle.queue.keys import SCHEMA_VERSION

Entry = TypeVar("Entry", LaneEntry, StreamEntry, Heartbeat, ControlEntry, News)

FIELD = b"d"
"""The one field of every stream entry."""
_WITHOUT_TASKS = 1


def encode(entry: LaneEntry | StreamEntry | Heartbeat | ControlEntry | News) -> bytes:
    """The entry's bytes; stamps on it the version of the first schema that has all that it says."""
    entry.version = SCHEMA_VERSION if _has_task(entry) else _WITHOUT_TASKS
    return entry.SerializeToString()


def _has_task(entry: LaneEntry | StreamEntry | Heartbeat | ControlEntry | News) -> bool:
    if isinstance(entry, LaneEntry):
        return entry.HasField("task")
    return isinstance(entry, StreamEntry) and entry.terminal.HasField("task_result")


def decode(kind: type[Entry], data: bytes) -> Entry:
    """The entry of `data`.

    Raises DataLoss (QUEUE_ENTRY_DAMAGED) for bytes that are no such entry, and FailedPrecondition
    (QUEUE_ENTRY_TOO_NEW) for one of a later schema, which a newer process must read.
    """
    entry = kind()
    try:
        entry.ParseFromString(data)
    except DecodeError as error:
        raise DataLoss(f"not a {kind.DESCRIPTOR.name}: {error}", reason="QUEUE_ENTRY_DAMAGED") from error
    if entry.version > SCHEMA_VERSION:
        raise FailedPrecondition(
            f"a {kind.DESCRIPTOR.name} of schema {entry.version}; this process reads up to {SCHEMA_VERSION}",
            reason="QUEUE_ENTRY_TOO_NEW",
        )
    if entry.version == 0:
        raise DataLoss(f"a {kind.DESCRIPTOR.name} without a version", reason="QUEUE_ENTRY_DAMAGED")
    return entry


def fields(entry: LaneEntry | StreamEntry | ControlEntry) -> dict[FieldT, EncodableT]:
    """The entry as the fields of a stream entry."""
    return {FIELD: encode(entry)}


def from_fields(kind: type[Entry], values: Mapping[bytes, bytes]) -> Entry:
    """The entry in the fields of a stream entry; raises as `decode` does."""
    return decode(kind, values.get(FIELD, b""))
