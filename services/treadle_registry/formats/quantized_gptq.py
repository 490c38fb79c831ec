"""GPTQ checkpoints (Frantar et al., 2022), as AutoGPTQ and GPTQModel write them.

Of a layer with I inputs and O outputs at b bits, in groups of n inputs:

    qweight  I32 [I b / 32, O]             packed along the inputs, the first in the lowest bits
    qzeros   I32 [ceil(I / n), O b / 32]   packed along the outputs; format "gptq" has them less one
    scales   F16 [ceil(I / n), O]
    g_idx    I32 [I]                       each input's group; not in all files

https://github.com/ModelCloud/GPTQModel, https://huggingface.co/docs/transformers/quantization/gptq
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
_WORD = 32


def read_gptq(config: QuantizationConfig, tensors: Tensors) -> QuantizedLayout:
    """Raises InvalidArgument (CORRUPT_CONFIG) for a configuration that cannot be."""
    bits = config.whole("bits", "w_bit", low=1, high=16)
    if bits is None:
        raise config.corrupt("bits", "must say how many bits a weight has", None)
    group = config.whole("group_size", low=-1, high=1 << 20, default=-1)
    assert group is not None
    form = config.text(
        "checkpoint_format", "format", default="marlin" if config.flag("is_marlin_format") else "gptq"
    )
    act_order = config.flag("desc_act")
    layout = QuantizedLayout(
        format=form,
        bits=bits,
        group_size=max(group, 0),
        strategy="group" if group > 0 else "channel",
        symmetric=config.flag("sym", default=True),
        activation_order=act_order,
        ignored=config.names("modules_to_not_convert"),
    )
    layout.because = "their integers are packed along the inputs, with zero points for each group" + (
        " and a group for each input (g_idx)" if act_order else ""
    )
    if form.startswith("marlin"):
        layout.because = "their integers lie in the order of the Marlin kernels for CUDA"
        _read_marlin(layout, tensors)
        return layout
    # GPTQModel may give layers bits of their own; then each need only agree with itself.
    is_mixed = bool(config.raw.get("dynamic"))
    for name in modules_with(tensors, "qweight"):
        _read_layer(layout, tensors, name, is_mixed)
    return layout


def _read_layer(layout: QuantizedLayout, tensors: Tensors, name: str, is_mixed: bool) -> None:
    qweight, qzeros, scales, g_idx = layout.take(tensors, name, "qweight", "qzeros", "scales", "g_idx")
    layout.take(tensors, name, "bias")
    if qweight is None or not is_matrix(qweight, *_INTEGERS):
        layout.problems.append(f"{name}.qweight is no matrix of 32-bit integers")
        return
    rows, outputs = qweight.shape
    if scales is None or not is_matrix(scales, *_FLOATS) or scales.shape[1] != outputs:
        layout.problems.append(f"{name}.scales is no matrix of a scale for each of {outputs} outputs")
        return
    bits = layout.bits
    found = _bits_of(qzeros, outputs)
    if found is None:
        layout.problems.append(f"{name}.qzeros is no matrix of packed zero points for {outputs} outputs")
        return
    if found != bits:
        if not is_mixed:
            layout.problems.append(
                f"{bits} bits are configured, and {name}.qzeros has {found} for each of {outputs} outputs"
            )
            return
        bits = found
    inputs = rows * _WORD // bits
    if g_idx is not None:
        if len(g_idx.shape) != 1 or g_idx.dtype not in _INTEGERS:
            layout.problems.append(f"{name}.g_idx is no list of groups")
            return
        if g_idx.shape[0] * bits != rows * _WORD:
            layout.problems.append(
                f"{name}.qweight has {rows} rows, {inputs} inputs at {bits} bits, and its g_idx has "
                f"{g_idx.shape[0]}"
            )
            return
        inputs = g_idx.shape[0]
    elif layout.activation_order:
        layout.problems.append(f"desc_act is configured, and {name} has no g_idx")
    groups = -(-inputs // layout.group_size) if layout.group_size else 1
    if scales.shape[0] != groups and not is_mixed:
        layout.problems.append(
            f"{name} has {scales.shape[0]} groups of scales; {inputs} inputs in groups of "
            f"{layout.group_size or inputs} are {groups}"
        )
    layout.layers[name] = QuantizedLayer(inputs * outputs, inputs, outputs)


def _bits_of(qzeros: StoredTensor | None, outputs: int) -> int | None:
    """Bits of a zero point, by how many words they take; None where that is no whole number."""
    if qzeros is None or not is_matrix(qzeros, *_INTEGERS) or not outputs:
        return None
    bits, rest = divmod(qzeros.shape[1] * _WORD, outputs)
    return bits if bits and not rest else None


def _read_marlin(layout: QuantizedLayout, tensors: Tensors) -> None:
    """B and s in the kernels' own order: [I / 16, O b / 2] words of the one, [groups, O] of the other."""
    for name in modules_with(tensors, "B"):
        words, scales = layout.take(tensors, name, "B", "s")
        if (
            words is None
            or not is_matrix(words, *_INTEGERS)
            or scales is None
            or not is_matrix(scales, *_FLOATS)
        ):
            layout.problems.append(f"{name} has no B of integers and s of scales, as Marlin has them")
            continue
        elements, outputs = words.elements * _WORD // layout.bits, scales.shape[1]
        inputs = elements // outputs if outputs and elements % outputs == 0 else None
        layout.layers[name] = QuantizedLayer(elements, inputs, outputs)
