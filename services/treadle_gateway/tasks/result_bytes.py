"""The raw bytes of a result as numbers: little-endian, and without a step of Python a number."""

from __future__ import annotations

import math
import sys
from array import array

from treadle.errors import Internal

_PAIR_BYTES = 8
_NUMBER_BYTES = 4


def check_size(data: bytes, expected: int) -> None:
    """Raises Internal (RESULT_MALFORMED) unless there are so many bytes."""
    if len(data) != expected:
        raise malformed(f"has {len(data)} bytes where {expected} were to come")


def malformed(what: str) -> Internal:
    """A result that is none of the work's."""
    return Internal(f"the worker's result {what}; is it of another version?", reason="RESULT_MALFORMED")


def floats(data: bytes, count: int) -> array[float]:
    """float32 [count]; raises Internal for another number of them, and for NaN."""
    check_size(data, _NUMBER_BYTES * count)
    numbers = _numbers("f", data)
    _check_numbers(numbers)
    return numbers


def pairs(data: bytes, count: int) -> tuple[array[int], array[float]]:
    """uint32 [count] and float32 [count], which lie one beside the other; raises as `floats` does."""
    check_size(data, _PAIR_BYTES * count)
    indices = _numbers("I", data)[::2]
    numbers = _numbers("f", data)[1::2]
    _check_numbers(numbers)
    return indices, numbers


def _numbers(code: str, data: bytes) -> array:  # type: ignore[type-arg]
    numbers = array(code, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _check_numbers(numbers: array[float]) -> None:
    # One that is no number makes the sum none.
    if math.isnan(sum(numbers)):
        raise malformed("holds what is no number")
