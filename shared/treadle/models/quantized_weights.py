"""How the worker's quantised weights lie in memory: groups of inputs that share a scale. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.models.quantization_config import group_size

QUANTIZATIONS = ("", "int8", "int4")
"""What weights may be quantised to in memory; "": not at all."""

_SCALE_BYTES: Mapping[str, int] = {"int8": 4, "int4": 2 + 2}
"""Of a group: a float32 scale; scale and minimum in bfloat16."""


def quantized_bytes(quantization: str, out_features: int, in_features: int, group: int = 0) -> int:
    """Bytes of a weight [out, in] with its scales; the last group of a row is filled up.

    `group`: inputs that share a scale; 0: as stored weights have it.
    """
    group = group or group_size(quantization, in_features)
    groups = -(-in_features // group)
    elements = groups * group if quantization == "int8" else groups * group // 2
    return out_features * (elements + groups * _SCALE_BYTES[quantization])
