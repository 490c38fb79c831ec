"""Checkpoints of other methods: recognised, counted where their tensors can be told apart, and named.

bitsandbytes, FP8 and MXFP4 are read by their tensors; HQQ, EETQ and what is not known here by name.
"""

from __future__ import annotations

from treadle_registry.formats.quantization_facts import (
    QuantizationConfig,
    QuantizedLayer,
    QuantizedLayout,
    Tensors,
    modules_with,
)

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def read_bitsandbytes(config: QuantizationConfig, tensors: Tensors) -> QuantizedLayout:
    """4 bits: weight U8 [N / 2, 1] with absmax, quant_map, quant_state; 8: weight I8 [O, I] with SCB [O].

    Dettmers et al., "LLM.int8()" (2022) and "QLoRA" (2023).
    """
    four = config.flag("load_in_4bit", "_load_in_4bit")
    form = config.text("bnb_4bit_quant_type", default="fp4") if four else "int8"
    nested = config.flag("bnb_4bit_use_double_quant")
    layout = QuantizedLayout(
        format=form,
        bits=4 if four else 8,
        group_size=64 if four else 0,
        strategy="group" if four else "channel",
        activation_bits=0 if four else 8,
        ignored=config.names("llm_int8_skip_modules", "modules_to_not_convert"),
        because="their codes are read by the library bitsandbytes alone"
        + (", and their scales are quantised once more" if nested else ""),
    )
    state = f"quant_state.bitsandbytes__{form}"
    for name in modules_with(tensors, "weight.absmax" if four else "SCB"):
        kinds = (
            (
                "weight",
                "weight.absmax",
                "weight.quant_map",
                "weight.nested_absmax",
                "weight.nested_quant_map",
                f"weight.{state}",
            )
            if four
            else ("weight", "SCB", "weight_format")
        )
        weight, *_ = layout.take(tensors, name, *kinds)
        dtype = "U8" if four else "I8"
        if weight is None or weight.dtype != dtype:
            found = "missing" if weight is None else weight.dtype
            layout.problems.append(
                f"{layout.bits} bits are configured, and {name}.weight is {found}, not {dtype}"
            )
        elif four:
            layout.layers[name] = QuantizedLayer(weight.elements * 2)
        else:
            shape = weight.shape if len(weight.shape) == 2 else (None, None)
            layout.layers[name] = QuantizedLayer(weight.elements, shape[1], shape[0])
    return layout


def read_fp8(config: QuantizationConfig, tensors: Tensors) -> QuantizedLayout:
    """Weight F8 [O, I] with weight_scale or, for blocks, weight_scale_inv [ceil(O / a), ceil(I / b)]."""
    block = config.raw.get("weight_block_size")
    if block is not None and (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(n) is int and 0 < n < 1 << 20 for n in block)
    ):
        raise config.corrupt("weight_block_size", "must be two sizes", block)
    layout = QuantizedLayout(
        format=config.text("fmt", default="e4m3"),
        bits=8,
        strategy="block" if block else "tensor",
        group_size=block[1] if block else 0,
        activation_bits=8 if config.text("activation_scheme") else 0,
        ignored=config.names("modules_to_not_convert", "ignored_layers"),
        because="nothing here multiplies with 8-bit floats",
    )
    for name in modules_with(tensors, "weight"):
        weight = tensors[f"{name}.weight"]
        if weight.dtype not in _FLOAT8 or len(weight.shape) != 2:
            continue
        _, inverse, scale, _ = layout.take(
            tensors, name, "weight", "weight_scale_inv", "weight_scale", "input_scale"
        )
        outputs, inputs = weight.shape
        due = (-(-outputs // block[0]), -(-inputs // block[1])) if block else None
        found = inverse or scale
        if found is None:
            layout.problems.append(f"{name} has no scale")
        elif due and found.shape != due:
            layout.problems.append(
                f"{name} has scales {list(found.shape)}; "
                f"blocks of {block} of [{outputs}, {inputs}] are {list(due)}"
            )
        else:
            layout.layers[name] = QuantizedLayer(weight.elements, inputs, outputs)
    return layout


def read_mxfp4(config: QuantizationConfig, tensors: Tensors) -> QuantizedLayout:
    """gpt-oss: `<experts>_blocks` U8 [..., G, 16] of two codes a byte, `<experts>_scales` U8 [..., G]."""
    layout = QuantizedLayout(
        format="mxfp4",
        bits=4,
        group_size=32,
        strategy="group",
        ignored=config.names("modules_to_not_convert"),
        because="their blocks are those of a mixture of experts, which is not served",
    )
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks, scales = tensors[f"{name}_blocks"], tensors.get(f"{name}_scales")
        layout.parts |= {f"{name}_blocks", f"{name}_scales"} & tensors.keys()
        if (
            blocks.dtype != "U8"
            or scales is None
            or blocks.shape[:-1] != scales.shape
            or blocks.shape[-1:] != (16,)
        ):
            layout.problems.append(
                f"{name}_blocks {list(blocks.shape)} has no _scales of one for each 32 values"
            )
        else:
            layout.layers[name] = QuantizedLayer(blocks.elements * 2)
    return layout


def read_by_name(config: QuantizationConfig, tensors: Tensors, method: str) -> QuantizedLayout:
    """What the configuration says, as far as its words are those that most methods use."""
    inner = config
    if method == "hqq":
        outer = config.inner("quant_config")
        inner = (outer.inner("weight_quant_params") if outer else None) or config
    bits = inner.whole(
        "bits", "nbits", "num_bits", "w_bit", low=1, high=16, default=8 if method == "eetq" else 0
    )
    group = inner.whole("group_size", "q_group_size", low=-1, high=1 << 20, default=0)
    layout = QuantizedLayout(
        format=config.text("format", "checkpoint_format", "weights", "quant_type", default=""),
        bits=bits or 0,
        group_size=max(group or 0, 0),
        strategy="group" if (group or 0) > 0 else "",
        ignored=config.names("modules_to_not_convert", "skip_modules", "ignore"),
        because="their layout is not known here",
    )
    if method == "eetq":
        layout.because = "their integers lie in the order of the EETQ kernels for CUDA"
        for name in modules_with(tensors, "weight_scales"):
            weight, _ = layout.take(tensors, name, "weight", "weight_scales")
            if weight is not None and weight.dtype == "I8" and len(weight.shape) == 2:
                layout.layers[name] = QuantizedLayer(weight.elements, weight.shape[0], weight.shape[1])
            else:
                layout.problems.append(f"{name}.weight is no matrix of 8-bit integers")
    if method == "hqq":
        layout.because = "their scales and zero points are optimised tensors beside each weight (W_q)"
        for name in modules_with(tensors, "W_q"):
            (packed,) = layout.take(tensors, name, "W_q")
            layout.parts |= {
                part for part in tensors if part.startswith(f"{name}.") and not part.endswith(".bias")
            }
            if packed is not None and layout.bits:
                layout.layers[name] = QuantizedLayer(packed.size * 8 // layout.bits)
    return layout
