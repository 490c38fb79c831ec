"""Messages of too many parts are refused before they are made objects, others are left alone."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
from google.longrunning import operations_proto_pb2
from hypothesis import given
from hypothesis import strategies as st

from treadle.api.inference.v1 import inference_pb2
from treadle.api.tokenizer.v1 import tokenizer_pb2
from treadle.errors import InvalidArgument
from treadle.rpc.decoding import Refused, decode
from treadle.rpc.wire_bounds import MAX_ELEMENTS, MAX_NUMBERS, check_wire

GENERATE = inference_pb2.GenerateRequest
SIZE = 15_000_000


def varint(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


FLOODS = {
    "messages": (GENERATE, field(1, field(9, b"\x0a\x00" * (SIZE // 2))), "generation.chat.messages"),
    "stop strings": (
        GENERATE,
        field(1, field(11, b"\x1a\x00" * (SIZE // 2))),
        "generation.stopping.stop_strings",
    ),
    "packed ids": (GENERATE, field(1, field(8, field(1, b"\x01" * SIZE))), "generation.token_ids.ids"),
    "ids one by one": (GENERATE, field(1, field(8, b"\x08\x01" * (SIZE // 2))), "generation.token_ids.ids"),
    "bias": (
        GENERATE,
        field(1, field(10, b"".join(field(9, b"\x08" + varint(n)) for n in range(100_000)))),
        "generation.sampling.logit_bias",
    ),
    "unknown fields": (GENERATE, b"\x9a\x06\x00" * 100_000, ""),
    "groups": (GENERATE, field(1, b"\x9b\x06\x9c\x06" * 100_000), "generation"),
    "inputs": (tokenizer_pb2.EncodeRequest, b"\x12\x00" * (SIZE // 2), "inputs"),
    "floats": (
        inference_pb2.ScoreResponse,
        field(3, field(2, bytes(4 * MAX_NUMBERS + 4))),
        "scores.logprobs",
    ),
}


@pytest.mark.parametrize("case", FLOODS)
def test_floods(case: str):
    kind, data, named = FLOODS[case]
    started = time.process_time()
    tracemalloc.start()
    refused = decode(kind.FromString, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{len(data) / 1e6:.0f} MB, {time.process_time() - started:.3f} s, peak {peak / 1e6:.1f} MB")
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, InvalidArgument)
    assert refused.error.reason == "TOO_MANY_ELEMENTS"
    assert [violation.field for violation in refused.error.fields] == ([named] if named else [])
    # No more than a copy of the message, or an entry for each part that was looked at.
    assert peak < SIZE + (32 << 20)


def test_the_bounds_are_exact():
    request = tokenizer_pb2.EncodeRequest(model="m" * 200_000)
    request.inputs.extend([tokenizer_pb2.EncodeInput()] * (MAX_ELEMENTS - 1))
    data = request.SerializeToString()
    assert decode(tokenizer_pb2.EncodeRequest.FromString, data) == request
    assert isinstance(decode(tokenizer_pb2.EncodeRequest.FromString, data + b"\x12\x00"), Refused)
    row = tokenizer_pb2.DecodeInput(ids=[(1 << 32) - 1] * MAX_NUMBERS)
    ids = tokenizer_pb2.DecodeRequest(inputs=[row])
    data = ids.SerializeToString()
    assert decode(tokenizer_pb2.DecodeRequest.FromString, data) == ids
    row.ids.append(0)
    ids = tokenizer_pb2.DecodeRequest(inputs=[row])
    assert isinstance(decode(tokenizer_pb2.DecodeRequest.FromString, ids.SerializeToString()), Refused)


def test_large_messages_of_few_parts_pass_at_once():
    for text in ("a" * SIZE, "線" * (SIZE // 3)):
        request = GENERATE(generation={"model": "m", "text": text, "stopping": {"stop_strings": ["a"] * 16}})
        data = request.SerializeToString()
        started = time.process_time()
        check_wire(data, GENERATE.DESCRIPTOR)
        assert time.process_time() - started < 0.1
        assert decode(GENERATE.FromString, data) == request


@given(st.binary(max_size=200), st.integers(0, 1 << 30))
def test_what_is_no_message_is_left_to_the_decoder(data: bytes, seed: int):
    noise = data + random.Random(seed).randbytes(2 * MAX_ELEMENTS)
    for kind in (GENERATE, tokenizer_pb2.EncodeRequest, operations_proto_pb2.Operation):
        try:
            expected = kind.FromString(noise)
        except Exception:
            expected = None
        found = decode(kind.FromString, noise)
        if isinstance(found, Refused):
            assert found.error.reason in ("MALFORMED_MESSAGE", "TOO_MANY_ELEMENTS")
        else:
            assert found == expected


def test_a_function_that_is_no_messages_is_called_as_it_is():
    assert decode(bytes.hex, b"\x01") == "01"
    assert isinstance(decode(str, None), str)
    assert isinstance(decode(bytes.decode, b"\xff"), Refused)
