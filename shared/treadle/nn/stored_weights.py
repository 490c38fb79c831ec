"""Weights that were quantised before, from the tensors of a canonical folder."""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.models.config import ModelConfig
from treadle.models.llama import expected_tensors
from treadle.models.stored_weights import parts_of, quantized_products
from treadle.nn.llama import MERGED
from treadle.nn.quantization import Int4Weight, Int8Weight, QuantizedWeight, dequantize_mxfp4


def take_quantized(
    state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, QuantizedWeight]:
    """Takes out of `state` what the quantised products are stored as, and gives their weights by product.

    What is multiplied at once is one weight, under the name that `nn.llama` gives it. MXFP4 weights go back
    into `state` as floats: every one of their values is a bfloat16.
    """
    shapes = expected_tensors(config)
    quantized: dict[str, QuantizedWeight] = {}
    for product, form in quantized_products(config, config.quantization).items():
        shape = shapes[f"{product}.weight"]
        first, second, *rest = [state.pop(name) for name in parts_of(product, shape, form)]
        if form == "mxfp4":
            weight = dequantize_mxfp4(first, second, shape[1])
            state[f"{product}.weight"] = weight.to(device=device, dtype=dtype)
        elif form == "int8":
            quantized[product] = Int8Weight(first, second)
        else:
            quantized[product] = Int4Weight(first, second, rest[0], shape[1])
    for merged, parts in MERGED.items():
        for product in [name for name in quantized if name.endswith(f".{parts[0]}")]:
            rows = [quantized.pop(product.replace(parts[0], part)) for part in parts]
            quantized[product.replace(parts[0], merged)] = _one_after_another(rows)
    return quantized


def _one_after_another(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """The outputs of all; they have the same inputs, and so the same groups."""
    first = weights[0]
    numbers, scale, *rest = [
        torch.cat(rows) for rows in zip(*(weight[:3] for weight in weights), strict=True)
    ]
    if isinstance(first, Int8Weight):
        return Int8Weight(numbers, scale)
    return Int4Weight(numbers, scale, rest[0], first.in_features)
