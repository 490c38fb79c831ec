"""AWQ checkpoints (Lin et al., 2023), as AutoAWQ and llm-awq write them.

Of a layer with I inputs and O outputs at 4 bits, in groups of n inputs:

    gemm       qweight I32 [I, O / 8]           qzeros I32 [I / n, O / 8]   scales F16 [I / n, O]
    gemv       qweight I32 [O, I / 8]           qzeros I32 [O, z]           scales F16 [O, 8 z]
    gemv_fast  qweight I16 [O / 4, I]           qzeros F16 [8 z, O]         scales F16 [8 z, O]

with z = ceil(I / n / 8), made a multiple of 2 or 4 for groups of 64 or 32.
https://github.com/casper-hansen/AutoAWQ, awq/modules/linear
"""

from __future__ import annotations

from treadle_registry.formats.quantization_facts import (
    QuantizationConfig,
    QuantizedLayer,
    QuantizedLayout,
    Tensors,
    is_matrix,
    modules_with,
)
from treadle_registry.formats.safetensors_file import StoredTensor

_INTEGERS = ("I32", "U32")
_FLOATS = ("F16", "BF16", "F32")
_BECAUSE = {
    "gemm": "their integers are packed along the outputs, eight a word in the order 0, 2, 4, 6, 1, 3, 5, 7",
    "gemv": "their integers are packed along the inputs, with scales filled up for the GEMV kernel for CUDA",
    "gemv_fast": "their integers are interleaved by fours of outputs for the GEMV kernel for CUDA",
}


def read_awq(config: QuantizationConfig, tensors: Tensors) -> QuantizedLayout:
    """Raises InvalidArgument (CORRUPT_CONFIG) for a configuration that cannot be."""
    bits = config.whole("bits", "w_bit", low=1, high=16, default=4)
    group = config.whole("group_size", "q_group_size", low=-1, high=1 << 20, default=128)
    assert bits is not None
    assert group is not None
    form = config.text("version", default="gemm")
    layout = QuantizedLayout(
        format=form,
        bits=bits,
        group_size=max(group, 0),
        strategy="group" if group > 0 else "channel",
        symmetric=not config.flag("zero_point", default=True),
        ignored=config.names("modules_to_not_convert"),
        because=_BECAUSE.get(form, f"their integers lie in an order of their own ({form})"),
    )
    if 32 % bits:
        raise config.corrupt("bits", "must divide a word of 32", bits)
    for name in modules_with(tensors, "qweight"):
        qweight, qzeros, scales = layout.take(tensors, name, "qweight", "qzeros", "scales")
        layout.take(tensors, name, "bias")
        if qweight is None or scales is None or not is_matrix(scales, *_FLOATS):
            layout.problems.append(f"{name} has no matrix of scales")
        elif form in ("gemv", "gemv_fast"):
            _read_gemv(layout, name, qweight, scales, is_fast=form == "gemv_fast")
        else:
            _read_gemm(layout, name, qweight, qzeros, scales)
    return layout


def _read_gemm(
    layout: QuantizedLayout,
    name: str,
    qweight: StoredTensor,
    qzeros: StoredTensor | None,
    scales: StoredTensor,
) -> None:
    each = 32 // layout.bits
    if not is_matrix(qweight, *_INTEGERS):
        layout.problems.append(f"{name}.qweight is no matrix of 32-bit integers")
        return
    inputs, words = qweight.shape
    outputs = scales.shape[1]
    if words * each != outputs:
        layout.problems.append(
            f"{name}.qweight has {words} words a row, {words * each} outputs at {layout.bits} bits, and its "
            f"scales are for {outputs}"
        )
        return
    groups = inputs // layout.group_size if layout.group_size else 1
    if scales.shape[0] != groups:
        layout.problems.append(
            f"{name} has {scales.shape[0]} groups of scales; {inputs} inputs in groups of "
            f"{layout.group_size or inputs} are {groups}"
        )
    if not layout.symmetric and (qzeros is None or qzeros.shape != (scales.shape[0], words)):
        layout.problems.append(
            f"zero points are configured, and {name}.qzeros is not [{scales.shape[0]}, {words}]"
        )
    layout.layers[name] = QuantizedLayer(inputs * outputs, inputs, outputs)


def _read_gemv(
    layout: QuantizedLayout, name: str, qweight: StoredTensor, scales: StoredTensor, *, is_fast: bool
) -> None:
    if not is_matrix(qweight, *(("I16",) if is_fast else _INTEGERS)):
        layout.problems.append(f"{name}.qweight is no matrix of {'16' if is_fast else '32'}-bit integers")
        return
    if is_fast:
        outputs, inputs = qweight.shape[0] * 4, qweight.shape[1]
        scaled, width = scales.shape[1], scales.shape[0]
    else:
        outputs, inputs = qweight.shape[0], qweight.shape[1] * 32 // layout.bits
        scaled, width = scales.shape
    due = _padded_groups(inputs, layout.group_size or inputs, 32 // layout.bits)
    if (scaled, width) != (outputs, due):
        layout.problems.append(
            f"{name} has scales for {scaled} outputs and {width} groups; its integers are for {outputs}, and "
            f"{inputs} inputs in groups of {layout.group_size or inputs} are {due}, filled up"
        )
    layout.layers[name] = QuantizedLayer(inputs * outputs, inputs, outputs)


def _padded_groups(inputs: int, group: int, each: int) -> int:
    """Groups of a row, filled up to whole words of zero points, and to 2 or 4 of those for small groups."""
    multiple = {64: 2, 32: 4}.get(group, 1)
    words = -(-(inputs // max(group, 1)) // each)
    return -(-words // multiple) * multiple * each
