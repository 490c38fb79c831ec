"""Weights of few bits: near what they were, whatever stands beside them, and MXFP4 as it is specified."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from treadle.models.bfloat16 import round_to_bfloat16, widen_bfloat16
from treadle.models.quantization import (
    E2M1,
    pack_bytes,
    pack_words,
    quantize_int4,
    quantize_int8,
    quantize_mxfp4,
)
from treadle.models.quantization_config import group_size


def some_weights(
    rng: random.Random, outputs: int, inputs: int, *, smallest: int = -30
) -> NDArray[np.float32]:
    """Rows of very different sizes, with groups of zeros and of one value."""
    numbers = np.random.default_rng(rng.randrange(1 << 32))
    weights = numbers.standard_normal((outputs, inputs)) * 10.0 ** numbers.integers(
        smallest, 15, (outputs, 1)
    )
    weights = weights.astype(np.float32)
    for row in weights:
        first = rng.randrange(inputs)
        row[first : first + rng.randrange(80)] = rng.choice([0.0, float(row[0])])
    return weights


def each(of_group_Og: NDArray[np.float32], form: str, inputs: int) -> NDArray[np.float64]:
    return np.repeat(of_group_Og.astype(np.float64), group_size(form, inputs), axis=1)[:, :inputs]


def test_int8_is_within_half_a_step(rng):
    checked = 0
    for _ in range(40):
        weights = some_weights(rng, rng.randint(1, 30), rng.randint(1, 400))
        q, scale = quantize_int8(weights)
        step = each(scale, "int8", weights.shape[1])
        assert np.abs(q).max() <= 127
        assert (np.abs(q * step - weights) <= 0.5001 * step).all()
        # The largest of each group is one of the ends.
        tops = np.maximum.reduceat(np.abs(q), range(0, q.shape[1], group_size("int8", q.shape[1])), axis=1)
        assert ((tops == 127) | (scale == 0)).all()
        checked += weights.size
    print(f"{checked} weights within half a step")


def test_int4_is_nowhere_worse_than_the_whole_range(rng):
    checked = cut = 0
    for _ in range(40):
        # Squares that float32 has no numbers for are all alike.
        weights = some_weights(rng, rng.randint(1, 30), rng.randint(1, 400), smallest=-10)
        q, scale, minimum = quantize_int4(weights)
        assert q.max() <= 15
        inputs = weights.shape[1]
        wide_scale, wide_minimum = widen_bfloat16(scale), widen_bfloat16(minimum)
        off = q * each(wide_scale, "int4", inputs) + each(wide_minimum, "int4", inputs) - weights
        for group in range(scale.shape[1]):
            columns = slice(32 * group, min(32 * group + 32, inputs))
            x = weights[:, columns]
            low, high = x.min(1), x.max(1)
            whole_scale = widen_bfloat16(round_to_bfloat16((high - low) / np.float32(15)))[:, None]
            whole_minimum = widen_bfloat16(round_to_bfloat16(low))[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                place = np.where(whole_scale > 0, (x - whole_minimum) / whole_scale, 0)
            codes = np.clip(np.floor(place + 0.5), 0, 15).astype(np.float64)
            whole = codes * whole_scale + whole_minimum - x
            size = (x.astype(np.float64) ** 2).sum(1)
            assert ((off[:, columns] ** 2).sum(1) <= (whole**2).sum(1) + 1e-6 * size).all()
            cut += int((wide_scale[:, group] < whole_scale[:, 0]).sum())
        checked += scale.size
    print(f"{checked} groups, of which {cut} are met better without their ends")
    assert cut > 0


def slow_mxfp4(block: list[float]) -> tuple[list[int], int]:
    """A block's codes and scale, value by value in Python's floats: all of it is exact in them."""
    top = max(map(abs, block))
    exponent = -127 if top == 0 else min(max(math.floor(math.log2(top)) - 2, -127), 127)
    if top and not 2.0 ** (exponent + 2) <= top < 2.0 ** (exponent + 3):
        # math.log2 may round up to the next whole number.
        exponent = max(exponent - 1, -127)
    codes = []
    for value in block:
        scaled = abs(value) / 2.0**exponent
        distances = [(abs(scaled - float(magnitude)), code & 1, code) for code, magnitude in enumerate(E2M1)]
        _, _, code = min(distances)
        codes.append(code | (8 if math.copysign(1, value) < 0 else 0))
    return codes, exponent + 127


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_mxfp4_is_as_a_slow_reference_has_it(ties, rng):
    compared = halfway = 0
    for _ in range(25):
        outputs, inputs = rng.randint(1, 12), rng.randint(1, 150)
        weights = some_weights(rng, outputs, inputs)
        if ties:
            # Every eighth of the scale, so that all the places halfway are met.
            eighths = np.array([[rng.randint(-64, 64) for _ in range(inputs)] for _ in range(outputs)])
            weights = (eighths * 2.0 ** rng.randint(-100, 100)).astype(np.float32)
            halfway += eighths.size
        codes, scale = quantize_mxfp4(weights)
        for row in range(outputs):
            for block in range(scale.shape[1]):
                part = slice(32 * block, min(32 * block + 32, inputs))
                due, due_scale = slow_mxfp4(weights[row, part].tolist())
                assert scale[row, block] == due_scale
                assert codes[row, part].tolist() == due
                compared += len(due)
    print(f"{compared} codes equal, {halfway} of eighths")
    assert compared > 5000


def test_mxfp4_at_the_ends_of_what_floats_have():
    for values, codes, scale in (
        ([0.0, -0.0], [0, 8], 0),
        ([2.0**-149, -(2.0**-130)], [0, 8], 0),
        ([3.0 * 2.0**-127], [5], 0),
        ([3.4028235e38, 2.0**125], [7, 2], 252),
        ([7.0, 5.0, 2.5, -1.75, 0.25, 0.75], [7, 6, 4, 12, 0, 2], 127),
    ):
        found = quantize_mxfp4(np.array([values], np.float32))
        assert (found.code_OI.tolist(), found.scale_Og.tolist()) == ([codes], [[scale]]), values


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_mxfp4])
def test_rows_do_not_depend_on_their_neighbours(quantize, rng):
    compared = 0
    for inputs in (32, 100, 576, 3000):
        weights = some_weights(rng, 97, inputs)
        whole = quantize(weights)
        rows = slice(first := rng.randrange(90), first + rng.randint(1, 7))
        for part, of_whole in zip(quantize(weights[rows]), whole, strict=True):
            assert np.array_equal(part, of_whole[rows])
            compared += part.size
    print(f"{compared} numbers equal")


def test_packing(rng):
    for inputs in (1, 7, 8, 9, 64):
        numbers = np.array([[rng.randrange(16) for _ in range(inputs)] for _ in range(3)], np.uint8)
        words, packed = pack_words(numbers), pack_bytes(numbers)
        for row in range(3):
            for place in range(inputs):
                word = int(words[row, place // 8]) & 0xFFFFFFFF
                assert word >> 4 * (place % 8) & 15 == numbers[row, place]
                assert packed[row, place // 2] >> 4 * (place % 2) & 15 == numbers[row, place]
        assert (words.shape, packed.shape) == ((3, -(-inputs // 8)), (3, -(-inputs // 2)))
        assert (words.dtype, packed.dtype) == (np.int32, np.uint8)
