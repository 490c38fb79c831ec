"""A status travels in trailers, whatever text an error has."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import FieldViolation, InvalidArgument
from treadle.rpc import from_status, to_status

any_text = st.text(st.characters(), max_size=40).flatmap(
    lambda text: st.integers(1, 60).map(lambda times: text * times)
)
"""Half characters too."""


def trailer_bytes(status: status_pb2.Status) -> int:
    """What gRPC makes of it: grpc-message, and the details in base64."""
    return len(quote(status.message)) + len(base64.b64encode(status.SerializeToString()))


@given(any_text, st.lists(st.tuples(any_text, any_text), max_size=30), st.dictionaries(any_text, any_text))
def test_every_text_fits_and_comes_back(message: str, fields: list[tuple[str, str]], facts: dict[str, str]):
    violations = [FieldViolation(field, description) for field, description in fields]
    metadata = {f"key_{number}": value for number, value in enumerate(facts.values())}
    status = to_status(InvalidArgument(message, reason="REASON", fields=violations, metadata=metadata))
    assert trailer_bytes(status) < 8 << 10
    back = from_status(status_pb2.Status.FromString(status.SerializeToString()))
    whole = message.encode(errors="replace").decode()
    assert back.message == whole or (back.message.endswith("…") and whole.startswith(back.message[:-1]))
    assert len(back.fields) >= min(1, len(fields))


def test_many_facts_leave_room_for_the_fields():
    metadata = {f"key_{number}": "線" * 300 for number in range(20)}
    error = InvalidArgument("m" * 900, fields=[FieldViolation("f" * 300, "d" * 900)] * 9, metadata=metadata)
    back = from_status(to_status(error))
    assert back.fields
    assert 0 < len(back.metadata) < 20
    assert set(back.metadata) == set(list(metadata)[: len(back.metadata)])


@pytest.mark.parametrize("character", ["a", "é", "線", "🙂", "\ud800"])
def test_the_longest_texts(character: str):
    text = character * 100_000
    error = InvalidArgument(
        text, reason="REASON", fields=[FieldViolation(text, text)] * 20, metadata={"file": text}
    )
    status = to_status(error)
    print(f"{status.ByteSize()} bytes, {trailer_bytes(status)} in trailers")
    assert trailer_bytes(status) < 8 << 10
    back = from_status(status)
    assert (back.reason, len(back.fields) >= 1) == ("REASON", True)
    assert back.metadata["file"].endswith("…")
