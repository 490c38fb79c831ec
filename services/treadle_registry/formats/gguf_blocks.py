"""Turns GGUF's block formats into float32, a slice at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from treadle_registry.formats.gguf_reader import BLOCKS

_ELEMENTS = 1 << 17
"""Of a slice: what stays in the second-level cache is three times as fast as whole tensors."""

_LAYOUT = {name: (per_block, size) for name, per_block, size in BLOCKS.values()}


def dequantize(data: memoryview, form: str) -> Iterator[NDArray[np.float32]]:
    """The values of `data`, which is in the format `form`, in order, in flat slices.

    The arithmetic of each format is the `gguf` package's; a committed set of blocks that ggml quantised
    and dequantised holds it to ggml's own.
    """
    per_block, size = _LAYOUT[form]
    step = _ELEMENTS // per_block * size
    for start in range(0, len(data), step):
        yield _slice(np.frombuffer(data[start : start + step], dtype=np.uint8), form)


def _slice(raw: NDArray[np.uint8], form: str) -> NDArray[np.float32]:
    if form == "F32":
        return raw.view(np.float32)
    if form == "F16":
        return raw.view(np.float16).astype(np.float32)
    # Late, because it costs 0.4 s, and only quantised files need it.
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_rows

    # One row: the package works through sixteen at a time, which is slow for short rows. A scale that
    # ggml wrote as infinity or NaN gives NaN here as there, without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        values: NDArray[np.float32] = dequantize_rows(raw.reshape(1, -1), GGMLQuantizationType[form])
    return values.reshape(-1)
