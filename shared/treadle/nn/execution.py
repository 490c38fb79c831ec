"""Which kernels a loaded model runs on: decided once, by profile and machine, never by the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from treadle.errors import FailedPrecondition
from treadle.nn import native
from treadle.nn.linear import Linear, RMSNorm
from treadle.nn.llama import LlamaForCausalLM
from treadle.nn.quantization import QuantizedLinear

Quantization = Literal["", "int8", "int4"]
Kernels = Literal["auto", "native", "torch"]


def uses_native(dtype: torch.dtype, device: torch.device, kernels: Kernels) -> bool:
    """Whether products are the native kernels'.

    Raises FailedPrecondition where they are asked for and cannot be had.
    """
    if kernels == "torch":
        return False
    possible = device.type == "cpu" and dtype in native.SOURCES
    there = native.is_installed()
    if kernels == "native" and not (possible and there):
        why = "treadle-kernels is not installed" if possible else f"they have no {dtype} on {device}"
        raise FailedPrecondition(
            f'kernels = "native" cannot be had: {why}; use "auto"', reason="KERNELS_NOT_AVAILABLE"
        )
    return possible and there


@torch.inference_mode()
def prepare(model: LlamaForCausalLM, *, quantization: Quantization = "", kernels: Kernels = "auto") -> bool:
    """Gives every product its kernel; returns whether they are the native ones.

    Weights are packed one after another and let go of. The norms' are copied: only the embedding is still
    what was given.
    """
    weight = model.model.embed_tokens.weight
    use_native = uses_native(weight.dtype, weight.device, kernels)
    if quantization and weight.device.type != "cpu":
        raise FailedPrecondition(
            f"quantization {quantization} is for the CPU, not for {weight.device}",
            reason="QUANTIZATION_NOT_AVAILABLE",
        )
    for module in model.modules():
        if not isinstance(module, Linear):
            continue
        # Four bits are too few for the head: most of what they would cost in perplexity is lost there.
        form = "int8" if quantization == "int4" and module is model.lm_head else quantization
        if use_native:
            module.use(native.NativeLinear(module.weight, module.bias, form))
        elif form:
            module.use(QuantizedLinear(module.weight, module.bias, form))
        else:
            module.prepare()
    if use_native:
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight = nn.Parameter(module.weight.float().clone(), requires_grad=False)
        model.model.float32_stream = True
    return use_native
