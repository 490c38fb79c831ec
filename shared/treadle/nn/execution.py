"""Which kernels a loaded model runs on: decided once, by profile and machine, never by the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from treadle.errors import FailedPrecondition
from treadle.models.encoder_tensors import QUANTIZED, QUANTIZED_GROUP
from treadle.models.quantization_config import HEAD, form_of
from treadle.nn import native
from treadle.nn.encoder_layers import LayerNorm
from treadle.nn.encoder_model import EncoderModel
from treadle.nn.linear import Linear, RMSNorm
from treadle.nn.llama import Embedding, LlamaForCausalLM
from treadle.nn.quantization import QuantizedLinear, QuantizedWeight, quantize

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


def check_quantization(asked: Quantization, stored: str, device: torch.device) -> None:
    """Raises FailedPrecondition where what is stored as `stored` cannot be served as `asked` on `device`.

    "" is asked for by those who take a model as it is.
    """
    if stored and asked not in ("", stored):
        raise FailedPrecondition(
            f"the model is stored as {stored} and the engine is told {asked}: leave "
            f"TREADLE_ENGINE_QUANTIZATION empty, or serve the model that it was made of as {asked}",
            reason="QUANTIZED_OTHERWISE",
        )
    # MXFP4 becomes the dtype's own numbers as it is read.
    served = asked or stored
    if served in ("int8", "int4") and device.type != "cpu":
        way_out = "; serve the model that it was made of" if stored else ""
        raise FailedPrecondition(
            f"quantization {served} is for the CPU, not for {device}{way_out}",
            reason="QUANTIZATION_NOT_AVAILABLE",
        )


@torch.inference_mode()
def prepare(
    model: LlamaForCausalLM,
    *,
    quantization: Quantization = "",
    kernels: Kernels = "auto",
    quantized: dict[str, QuantizedWeight] | None = None,
) -> bool:
    """Gives every product its kernel; returns whether they are the native ones.

    `quantized` has the weights that were quantised before, by the product's name, and is emptied; the others
    are quantised here where `quantization` says so. Weights are packed one after another and let go of. The
    norms' are copied: only the embedding is still what was given. Raises FailedPrecondition for weights
    to quantise that are not finite (NOT_FINITE_WEIGHTS).
    """
    weight = model.model.embed_tokens.weight
    use_native = uses_native(weight.dtype, weight.device, kernels)
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        form = form_of(quantization, HEAD if module is model.lm_head else name)
        if quantized and (stored := quantized.pop(name, None)) is not None:
            kernel = native.pack_quantized if use_native else QuantizedLinear
            module.use(kernel(stored, module.bias))
        else:
            _give_kernel(name, module, form, use_native)
    if use_native:
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight = nn.Parameter(module.weight.float().clone(), requires_grad=False)
        model.model.float32_stream = True
    return use_native


@torch.inference_mode()
def prepare_encoder(
    model: EncoderModel, *, quantization: Quantization = "", kernels: Kernels = "auto"
) -> bool:
    """Gives every product its kernel, as `prepare` does; returns whether they are the native ones.

    Quantised are those products of the layers that QUANTIZED names; a head is small, and its logits are the
    answer. On the CPU everything else becomes float32: norms, small tables and the stream; the words'
    embedding is still what was given. Raises FailedPrecondition as `prepare` does.
    """
    weight = model.embeddings.words.weight
    use_native = uses_native(weight.dtype, weight.device, kernels)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            is_quantized = name.startswith("layers.") and name.rpartition(".")[2] in QUANTIZED
            _give_kernel(name, module, quantization if is_quantized else "", use_native, QUANTIZED_GROUP)
    if weight.device.type == "cpu":
        small = [module for module in model.modules() if isinstance(module, LayerNorm | Embedding)]
        for module in small:
            if module is model.embeddings.words:
                continue
            for parameter in module.parameters():
                parameter.data = parameter.float().clone()
    model.is_native = use_native
    return use_native


def _give_kernel(name: str, module: Linear, form: str, use_native: bool, group: int = 0) -> None:
    # In few bits they would be numbers like others, and answers wrong without a sign.
    if form and not all(torch.isfinite(end) for end in torch.aminmax(module.weight)):
        raise FailedPrecondition(
            f"{name}.weight has values that are not finite, which cannot be quantised as {form}; serve a "
            "sound model",
            reason="NOT_FINITE_WEIGHTS",
        )
    if use_native:
        module.use(native.pack(module.weight, module.bias, form, group if form else 0))
    elif form:
        module.use(QuantizedLinear(quantize(module.weight, form, group), module.bias, group))
    else:
        module.prepare()
