from __future__ import annotations

import pytest

from treadle.api.worker.v1.queue_pb2 import ControlEntry, Heartbeat, LaneEntry, StreamEntry
from treadle.errors import DataLoss, FailedPrecondition
from treadle.queue import codec
from treadle.queue.keys import SCHEMA_VERSION


@pytest.mark.parametrize("kind", [LaneEntry, StreamEntry, Heartbeat, ControlEntry])
def test_what_is_encoded_is_decoded_with_its_version(kind):
    entry = codec.decode(kind, codec.encode(kind()))
    assert entry == kind(version=1)


def test_a_later_schema_is_refused():
    data = LaneEntry(version=SCHEMA_VERSION + 1).SerializeToString()
    with pytest.raises(FailedPrecondition) as caught:
        codec.decode(LaneEntry, data)
    assert caught.value.reason == "QUEUE_ENTRY_TOO_NEW"


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", LaneEntry(request_id="r").SerializeToString()])
def test_bytes_that_are_no_entry_are_data_loss(data: bytes):
    with pytest.raises(DataLoss):
        codec.decode(LaneEntry, data)
    with pytest.raises(DataLoss):
        codec.from_fields(LaneEntry, {})
