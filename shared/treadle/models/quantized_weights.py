"""How the worker's quantised weights lie in memory: groups of inputs that share a scale. No torch."""

from __future__ import annotations

from collections.abc import Mapping

QUANTIZATIONS = ("", "int8", "int4")
"""What weights may be quantised to in memory; "": not at all."""

_INT8_GROUPS = (96, 64)
"""The first that divides a product's inputs, else the last: each group costs time, and each input of one
precision."""
_INT4_GROUP = 32

_SCALE_BYTES: Mapping[str, int] = {"int8": 4, "int4": 2 + 2}
"""Of a group: a float32 scale; scale and minimum in bfloat16."""


def group_size(quantization: str, in_features: int) -> int:
    """Inputs that share a scale, of a row and of an output's weights; 0: no quantisation."""
    if quantization == "int8":
        return next((size for size in _INT8_GROUPS if in_features % size == 0), _INT8_GROUPS[-1])
    return _INT4_GROUP if quantization == "int4" else 0


def quantized_bytes(quantization: str, out_features: int, in_features: int) -> int:
    """Bytes of a weight [out, in] with its scales; the last group of a row is filled up."""
    group = group_size(quantization, in_features)
    groups = -(-in_features // group)
    elements = groups * group if quantization == "int8" else groups * group // 2
    return out_features * (elements + groups * _SCALE_BYTES[quantization])
