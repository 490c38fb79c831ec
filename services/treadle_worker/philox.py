"""Counter-based random numbers: a draw depends on its seed and position, and on nothing else.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: UInt64Array, key: UInt64Array) -> UInt64Array:
    """Ten rounds over 32-bit words that stand in 64-bit ones: counter [4, R], key [2, R] → [4, R]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> _32) ^ c1 ^ k0,
            second & _LOW,
            (first >> _32) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(seeds: UInt64Array, positions: UInt64Array) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each seed [R] and position [R]."""
    zero = np.zeros_like(positions)
    counter = np.stack([positions & _LOW, positions >> _32, zero, zero])
    words = philox4x32(counter, np.stack([seeds & _LOW, seeds >> _32]))
    bits = (words[0] << _32 | words[1]) >> np.uint64(11)
    u: npt.NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return u
