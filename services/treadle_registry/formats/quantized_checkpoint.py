"""Checkpoints that somebody else quantised: what exactly they are, and why they cannot be served.

Their configuration and the headers of their tensors tell it. Nothing is dequantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.errors import FailedPrecondition, InvalidArgument, TreadleError
from treadle_registry.formats.quantization_facts import (
    QuantizationConfig,
    QuantizedLayer,
    QuantizedLayout,
    Tensors,
)
from treadle_registry.formats.quantized_awq import read_awq
from treadle_registry.formats.quantized_compressed import read_compressed
from treadle_registry.formats.quantized_gptq import read_gptq
from treadle_registry.formats.quantized_others import (
    read_bitsandbytes,
    read_by_name,
    read_fp8,
    read_mxfp4,
)

QUANTIZATION_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files beside config.json, and whose they are where they do not say it."""
_KEYS = ("quantization_config", "compression_config")
_READERS: Mapping[str, Callable[[QuantizationConfig, Tensors], QuantizedLayout]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "bitsandbytes": read_bitsandbytes,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "mxfp4": read_mxfp4,
}
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "eetq": "EETQ",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_SAID = 3
"""Contradictions in a message; the rest is counted."""
_LONGEST_SAID = 300
_MOST_KEPT = 100


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """What a quantised checkpoint is. Sizes in elements; `group_size` 0 is a whole row."""

    method: str
    format: str
    bits: int
    group_size: int
    strategy: str
    symmetric: bool
    activation_order: bool
    activation_bits: int
    ignored_modules: tuple[str, ...]
    quantized_parameters: int
    unquantized_parameters: int
    summary: str
    """One line for people."""
    because: str
    """Why it is not served, as the end of a sentence."""
    problems: tuple[str, ...] = ()
    """Where configuration and tensors contradict one another."""


def find_quantization(
    config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]
) -> QuantizationConfig | None:
    """The description of a quantisation, in config.json or `beside` it; None where there is none.

    `beside` has what those of QUANTIZATION_FILES say that are there. Raises InvalidArgument (CORRUPT_CONFIG).
    """
    text = config.get("text_config")
    holders = {"config.json": config, "config.json: text_config": text if isinstance(text, Mapping) else {}}
    for where, holder in holders.items():
        for key in _KEYS:
            if found := holder.get(key):
                if not isinstance(found, Mapping):
                    raise QuantizationConfig({}, where).corrupt(key, "must be an object", found)
                return QuantizationConfig(found, f"{where}: {key}")
    for name, method in QUANTIZATION_FILES.items():
        if name in beside:
            raw = beside[name]
            inner = raw.get("quantization")
            raw = inner if isinstance(inner, Mapping) else raw
            return QuantizationConfig({"quant_method": method, **raw}, name)
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model before it was quantised."""
    return {key: value for key, value in config.items() if key not in _KEYS}


def describe(
    config: QuantizationConfig, tensors: Tensors, expected: Mapping[str, tuple[int, ...]] | None = None
) -> QuantizedCheckpoint:
    """Reads the layout. `expected` has the shapes of a known architecture's tensors, [outputs, inputs].

    Raises InvalidArgument (CORRUPT_CONFIG) for values that cannot be.
    """
    method = _method(config)
    reader = _READERS.get(method)
    layout = reader(config, tensors) if reader else read_by_name(config, tensors, method)
    problems = list(layout.problems)
    if expected is not None:
        problems += _shape_problems(layout, expected)
    problems += [
        f"{name} is among the modules that are not quantised, and it is"
        for name in layout.ignored
        if name in layout.layers
    ]
    if reader and not layout.layers and not problems:
        problems.append(f"{method} is configured, and no tensor is quantised so")
    quantized = sum(layer.elements for layer in layout.layers.values())
    kept = sum(
        tensor.elements
        for name, tensor in tensors.items()
        if name not in layout.parts and tensor.dtype in _FLOATS and not name.endswith("rotary_emb.inv_freq")
    ) + sum(tensors[name].elements for name in layout.parts if name.endswith(".bias"))
    return QuantizedCheckpoint(
        method=method,
        format=layout.format,
        bits=layout.bits,
        group_size=layout.group_size,
        strategy=layout.strategy,
        symmetric=layout.symmetric,
        activation_order=layout.activation_order,
        activation_bits=layout.activation_bits,
        ignored_modules=layout.ignored,
        quantized_parameters=quantized,
        unquantized_parameters=kept,
        summary=_summary(method, layout, quantized, kept),
        because=layout.because,
        problems=tuple(problem[:_LONGEST_SAID] for problem in problems[:_MOST_KEPT]),
    )


def refusal(checkpoint: QuantizedCheckpoint, *, is_encoder: bool = False) -> TreadleError:
    """What ImportModel says of it.

    FailedPrecondition (UNSUPPORTED_QUANTIZATION), or InvalidArgument (CORRUPT_QUANTIZATION) where it
    contradicts itself.
    """
    if checkpoint.problems:
        more = len(checkpoint.problems) - _SAID
        said = "; ".join(checkpoint.problems[:_SAID])
        return InvalidArgument(
            f"the weights are said to be {checkpoint.summary}, but {said}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Download the model again, or import the unquantised one",
            reason="CORRUPT_QUANTIZATION",
        )
    way_out = (
        "Import the unquantised model: an encoder is quantised as it is loaded (quantization int8 of its "
        "deployment)"
        if is_encoder
        else "Import the unquantised model, or its GGUF file, and quantise it here (treadle models quantize)"
    )
    return FailedPrecondition(
        f"the weights are {checkpoint.summary}. Such weights are read and not served: {checkpoint.because}. "
        f"{way_out}",
        reason="UNSUPPORTED_QUANTIZATION",
    )


def _method(config: QuantizationConfig) -> str:
    method = config.text("quant_method", "quant_algo")
    if not method and (config.flag("load_in_4bit") or config.flag("load_in_8bit")):
        return "bitsandbytes"
    if not method and config.inner("config_groups"):
        return "compressed-tensors"
    # Intel's AutoRound packs as one of the others does.
    if "auto-round" in method or "autoround" in method:
        packing = config.text("packing_format")
        return "gptq" if "gptq" in packing else "awq" if "awq" in packing else "auto-round"
    return method.replace("_", "-") if method.startswith("compressed") else method or "unknown"


def _shape_problems(layout: QuantizedLayout, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for name, layer in layout.layers.items():
        shape = expected.get(f"{name}.weight")
        if shape is None:
            problems.append(f"{name} is quantised, and the architecture has no such layer")
        elif len(shape) != 2:
            problems.append(f"{name} is quantised, and is no linear layer")
        elif not _is_of(layer, shape, layout.bits):
            size = [layer.outputs or shape[0], layer.inputs] if layer.inputs else layer.elements
            problems.append(
                f"{name} has {size} weights at {layout.bits} bits, and config.json means {list(shape)}"
            )
    return problems


def _is_of(layer: QuantizedLayer, shape: tuple[int, ...], bits: int) -> bool:
    """Whether the layer's weights are those of a layer [outputs, inputs]."""
    outputs, inputs = shape
    if layer.outputs not in (None, outputs) or layer.elements < outputs * inputs:
        return False
    filled = 32 // max(bits, 1) if layer.is_filled else 1
    return layer.inputs is None or inputs <= layer.inputs < inputs + filled


def _summary(method: str, layout: QuantizedLayout, quantized: int, kept: int) -> str:
    """As in "AWQ (gemm), 4 bits in groups of 128, with zero points; 6.5 billion of 7.2 billion …"."""
    parts = [_NAMES.get(method, method) + (f" ({layout.format})" if layout.format else "")]
    if layout.bits:
        scales = {"group": f" in groups of {layout.group_size}", "channel": " with a scale an output"}
        scales |= {"tensor": " with a scale a tensor", "block": " in blocks"}
        scales["tensor_group"] = scales["group"]
        parts.append(f"{layout.bits} bits" + scales.get(layout.strategy, ""))
        parts.append("symmetric" if layout.symmetric else "with zero points")
    if layout.activation_order:
        parts.append("act-order")
    if layout.activation_bits:
        parts.append(f"activations in {layout.activation_bits} bits")
    counted = f"; {_count(quantized)} of {_count(quantized + kept)} parameters quantised" if quantized else ""
    return ", ".join(parts) + counted


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)
