"""Bytes that an element of a tensor takes, by the name of its type. No torch.

Quantised types keep elements in blocks that share scales, so an element's share of a block's bytes may be a
fraction; each is a sum of powers of two, so that sizes are exact.
"""

from __future__ import annotations

from collections.abc import Mapping

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Types that a model is computed in."""

GGUF_BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q1_0": (128, 18),
}
"""ggml's formats: elements a block, bytes a block."""

_NOMINAL: Mapping[str, float] = {"int8": 1.0, "int4": 0.5}
"""Of the elements alone, without the scales beside them."""


def element_bytes(form: str) -> float:
    """Bytes an element of "bfloat16", "int4", "Q4_K", …; raises KeyError for an unknown name.

    "int8" and "int4" are counted without their scales, as accelerate and bitsandbytes count them.
    """
    if form in DTYPE_BYTES:
        return DTYPE_BYTES[form]
    if form in _NOMINAL:
        return _NOMINAL[form]
    elements, size = GGUF_BLOCKS[form]
    return size / elements
