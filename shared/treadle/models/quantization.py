"""How weights are rounded to few bits: the definition that every artifact, kernel and fallback agrees with.

numpy alone, each operation in float32 and in one order, so that the result is the same on every machine; the
native kernels' packing (shared/kernels/src/pack.cpp) gives the same bits. Weights must be finite.

Shapes: O outputs, I inputs, g groups of n inputs; R some of the outputs, G the groups of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treadle.models.bfloat16 import round_to_bfloat16, widen_bfloat16
from treadle.models.quantization_config import group_size

_CUTS = (0.03, 0.06, 0.1)
"""Shares of a group's range that are cut off at either end, to see whether the rest is met better."""
_PIECE = 1 << 17
"""Weights at a time: what is computed with them stays in a core's cache."""

_E2M1_LARGEST_EXPONENT = 2
_E8M0_BIAS = 127
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""The eight magnitudes by their code; a code's fourth bit is the sign."""
_ROUND_UP_ABOVE = (0.25, 1.25, 2.5, 5.0)
"""Halfway to the next magnitude where this one's code is even: the tie stays."""
_ROUND_UP_FROM = (0.75, 1.75, 3.5)
"""Halfway where the next one's code is even: the tie goes up."""


class Int8(NamedTuple):
    """`scale * q`: a float32 scale for each group of inputs."""

    q_OI: NDArray[np.int8]
    scale_Og: NDArray[np.float32]


class Int4(NamedTuple):
    """`scale * q + minimum`, q from 0 to 15; scale and minimum are bits of bfloat16."""

    q_OI: NDArray[np.uint8]
    scale_Og: NDArray[np.uint16]
    minimum_Og: NDArray[np.uint16]


class Mxfp4(NamedTuple):
    """Codes of E2M1 and, for each block of 32 inputs, E8M0: an exponent of two plus 127."""

    code_OI: NDArray[np.uint8]
    scale_Og: NDArray[np.uint8]


def quantize_int8(weight_OI: NDArray[np.float32], group: int = 0) -> Int8:
    """To the nearest of 255 steps between the group's largest weight and its negative.

    `group`: inputs that share a scale; 0: as stored weights have it.
    """
    outputs, inputs = weight_OI.shape
    size = group or group_size("int8", inputs)
    q_OI = np.empty((outputs, inputs), np.int8)
    scale_Og = np.empty((outputs, -(-inputs // size)), np.float32)
    for rows, columns, groups, x_Rgn in _pieces(weight_OI, size):
        top_Rg = np.abs(x_Rgn).max(-1)
        with np.errstate(divide="ignore", over="ignore"):
            inverse_Rg = np.where(top_Rg > 0, np.float32(127) / top_Rg, np.float32(0))
        # Weights so small that this is beyond float32 are zeros.
        inverse_Rg[~np.isfinite(inverse_Rg)] = 0
        scaled_Rgn = np.rint(x_Rgn * inverse_Rg[..., None])
        q_OI[rows, columns] = scaled_Rgn.astype(np.int8).reshape(len(x_Rgn), -1)
        scale_Og[rows, groups] = top_Rg / np.float32(127)
    return Int8(q_OI, scale_Og)


def quantize_int4(weight_OI: NDArray[np.float32]) -> Int4:
    """To 16 steps over the group's range, or over the part of it that gives the least squared error."""
    outputs, inputs = weight_OI.shape
    size = group_size("int4", inputs)
    shape = (outputs, -(-inputs // size))
    q_OI = np.empty((outputs, inputs), np.uint8)
    scale_Og, minimum_Og = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    for rows, columns, groups, x_Rgn in _pieces(weight_OI, size):
        # Inputs first, so that the groups stand side by side and each operation is over all of them.
        x_nG = np.ascontiguousarray(x_Rgn.reshape(-1, x_Rgn.shape[-1]).T)
        with np.errstate(all="ignore"):
            scale_G, minimum_G = _best_range(x_nG)
            q_nG = _codes(x_nG, scale_G, minimum_G)
        q_OI[rows, columns] = q_nG.astype(np.uint8).T.reshape(len(x_Rgn), -1)
        scale_Og[rows, groups] = round_to_bfloat16(scale_G).reshape(len(x_Rgn), -1)
        minimum_Og[rows, groups] = round_to_bfloat16(minimum_G).reshape(len(x_Rgn), -1)
    return Int4(q_OI, scale_Og, minimum_Og)


def _best_range(x_nG: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and minimum of the least error; of equal ones, that which cuts the least off."""
    low_G, high_G = x_nG.min(0), x_nG.max(0)
    best = scale_G, minimum_G, error_G = _fit(x_nG, low_G, high_G)
    for cut in _CUTS:
        by_G = (high_G - low_G) * np.float32(cut)
        for ends in ((low_G + by_G, high_G), (low_G, high_G - by_G), (low_G + by_G, high_G - by_G)):
            fit = _fit(x_nG, *ends)
            better_G = fit[2] < error_G
            for kept, found in zip(best, fit, strict=True):
                kept[better_G] = found[better_G]
    return scale_G, minimum_G


def _fit(
    x_nG: NDArray[np.float32], low_G: NDArray[np.float32], high_G: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Scale and minimum as they are stored, and the squared error, summed from the first input on."""
    scale_G = widen_bfloat16(round_to_bfloat16((high_G - low_G) / np.float32(15)))
    minimum_G = widen_bfloat16(round_to_bfloat16(low_G))
    off_nG = _codes(x_nG, scale_G, minimum_G)
    off_nG *= scale_G
    off_nG += minimum_G
    off_nG -= x_nG
    off_nG *= off_nG
    error_G = off_nG[0].copy()
    for row_G in off_nG[1:]:
        error_G += row_G
    return scale_G, minimum_G, error_G


def _codes(
    x_nG: NDArray[np.float32], scale_G: NDArray[np.float32], minimum_G: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The code, 0 to 15, that is nearest to each input, as a float."""
    inverse_G = np.where(scale_G > 0, np.float32(1) / scale_G, np.float32(0))
    place_nG: NDArray[np.float32] = x_nG - minimum_G
    place_nG *= inverse_G
    place_nG += np.float32(0.5)
    np.fmax(place_nG, np.float32(0), out=place_nG)
    np.fmin(place_nG, np.float32(15.5), out=place_nG)
    return np.floor(place_nG, out=place_nG)


def quantize_mxfp4(weight_OI: NDArray[np.float32]) -> Mxfp4:
    """OCP Microscaling Formats (MX) v1.0, section 6.3, with E2M1 rounded to nearest, ties to even.

    A block's scale is the power of two that puts its largest weight into E2M1's highest binade; what is then
    beyond 6 becomes 6.
    """
    outputs, inputs = weight_OI.shape
    size = group_size("mxfp4", inputs)
    code_OI = np.empty((outputs, inputs), np.uint8)
    scale_Og = np.empty((outputs, -(-inputs // size)), np.uint8)
    for rows, columns, groups, x_Rgn in _pieces(weight_OI, size):
        # top is m * 2 ** e with m in [0.5, 1); 0 has the exponent of the smallest scale.
        top_Rg = np.abs(x_Rgn).max(-1)
        _, e_Rg = np.frexp(top_Rg)
        exponent_Rg = np.where(top_Rg > 0, e_Rg - 1 - _E2M1_LARGEST_EXPONENT, -_E8M0_BIAS)
        exponent_Rg = np.maximum(exponent_Rg, -_E8M0_BIAS)
        scaled_Rgn = np.abs(x_Rgn) * np.ldexp(np.float32(1), -exponent_Rg)[..., None]
        codes_Rgn = np.signbit(x_Rgn).astype(np.uint8) << np.uint8(3)
        for halfway in _ROUND_UP_ABOVE:
            codes_Rgn += scaled_Rgn > np.float32(halfway)
        for halfway in _ROUND_UP_FROM:
            codes_Rgn += scaled_Rgn >= np.float32(halfway)
        code_OI[rows, columns] = codes_Rgn.reshape(len(x_Rgn), -1)
        scale_Og[rows, groups] = (exponent_Rg + _E8M0_BIAS).astype(np.uint8)
    return Mxfp4(code_OI, scale_Og)


def _pieces(
    weight_OI: NDArray[np.float32], size: int
) -> Iterator[tuple[slice, slice, slice, NDArray[np.float32]]]:
    """Some rows at a time, their whole groups and then the last one that is not full.

    Rows, columns, groups, and the weights [R, g, n].
    """
    outputs, inputs = weight_OI.shape
    whole = inputs // size
    step = max(1, _PIECE // inputs)
    for first in range(0, outputs, step):
        rows = slice(first, min(first + step, outputs))
        x_RI = weight_OI[rows]
        if whole:
            columns = slice(0, whole * size)
            yield rows, columns, slice(0, whole), x_RI[:, columns].reshape(len(x_RI), whole, size)
        if inputs % size:
            columns = slice(whole * size, inputs)
            yield rows, columns, slice(whole, whole + 1), x_RI[:, columns].reshape(len(x_RI), 1, -1)


def pack_words(q_OI: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Eight numbers of four bits a word [O, ceil(I / 8)], the first in the lowest bits."""
    q_OI = np.pad(q_OI, ((0, 0), (0, -q_OI.shape[1] % 8)))
    bytes_OB = q_OI[:, 0::2] | q_OI[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(bytes_OB).view("<i4")


def pack_bytes(code_OI: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two numbers of four bits a byte [O, ceil(I / 2)], the first in the lower half."""
    code_OI = np.pad(code_OI, ((0, 0), (0, code_OI.shape[1] % 2)))
    packed: NDArray[np.uint8] = code_OI[:, 0::2] | code_OI[:, 1::2] << np.uint8(4)
    return packed
