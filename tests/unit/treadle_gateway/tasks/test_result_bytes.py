"""A result's bytes: as many as were to come, and numbers."""

from __future__ import annotations

import math
import struct

import pytest

from treadle.errors import Internal
from treadle_gateway.tasks.result_bytes import floats, pairs


def test_numbers_come_back_as_they_were_written(rng):
    values = [struct.unpack("<f", struct.pack("<f", rng.uniform(-9, 9)))[0] for _ in range(1000)]
    indices = [rng.randrange(2**32) for _ in values]
    assert floats(struct.pack("<1000f", *values), 1000).tolist() == values
    mixed = b"".join(struct.pack("<If", *pair) for pair in zip(indices, values, strict=True))
    found = pairs(mixed, 1000)
    assert (found[0].tolist(), found[1].tolist()) == (indices, values)
    assert floats(b"", 0).tolist() == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_size_is_the_workers_fault(count):
    for read in (floats, pairs):
        for size in (-1, 1, 7):
            data = bytes(max(0, (4 if read is floats else 8) * count + size))
            if len(data) == (4 if read is floats else 8) * count:
                continue
            with pytest.raises(Internal) as caught:
                read(data, count)
            assert caught.value.reason == "RESULT_MALFORMED"


def test_what_is_no_number_is_refused_and_infinity_is_one():
    with pytest.raises(Internal):
        floats(struct.pack("<3f", 1, math.nan, 2), 3)
    with pytest.raises(Internal):
        pairs(struct.pack("<If", 1, math.nan), 1)
    assert pairs(struct.pack("<If", 1, -math.inf), 1)[1].tolist() == [-math.inf]
