"""bfloat16 with numpy alone, as its bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16 of each value as its bits, ties to even; NaN stays NaN, quiet.

    Adding 0x7FFF plus the lowest kept bit carries into the upper half exactly when the lower half is
    above one half, or is one half and the upper half is odd (IEEE 754, roundTiesToEven).
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    halves = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        halves[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return halves


def widen_bfloat16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 of each bfloat16, exactly."""
    bits: NDArray[np.uint32] = halves.astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)
