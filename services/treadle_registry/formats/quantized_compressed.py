"""compressed-tensors checkpoints, as llm-compressor and vLLM have them.

Of a layer with I inputs and O outputs, by the format of its group:

    pack-quantized          weight_packed I32 [O, ceil(I b / 32)], weight_shape [2], weight_scale;
                            weight_zero_point where asymmetric, weight_g_idx I32 [I] with actorder "group"
    int-quantized           weight I8 [O, I]           weight_scale
    float-quantized         weight F8_E4M3 [O, I]      weight_scale
    naive-quantized         either of the two
    nvfp4-pack-quantized    weight_packed U8 [O, I / 2], weight_scale F8_E4M3 [O, I / 16], weight_global_scale
    mxfp4-pack-quantized    weight_packed U8 [O, I / 2], weight_scale U8 [O, I / 32]

weight_scale is [1] for the strategy tensor, [O, 1] for channel, [O, ceil(I / n)] for group, and a number for
each block of rows and columns for block. https://github.com/neuralmagic/compressed-tensors

A group's targets and the ignored modules may be regular expressions of a stranger's: they are not evaluated.
A layer has to agree with one of the groups, whichever it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle_registry.formats.quantization_facts import (
    QuantizationConfig,
    QuantizedLayer,
    QuantizedLayout,
    Tensors,
    modules_with,
)
from treadle_registry.formats.safetensors_file import StoredTensor

_PACKED_FLOATS = {"nvfp4": 16, "mxfp4": 32}
_MAX_GROUPS = 256
_BECAUSE = (
    "their scales and integers are another tool's: of this layout only what Treadle derived itself is served"
)


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How the weights of a group of layers are quantised."""

    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int] | None
    has_order: bool
    input_bits: int


def read_compressed(config: QuantizationConfig, tensors: Tensors) -> QuantizedLayout:
    """Raises InvalidArgument (CORRUPT_CONFIG) for a configuration that cannot be."""
    schemes = _schemes(config)
    layout = QuantizedLayout(
        format=config.text("format", default="dense"), ignored=config.names("ignore"), because=_BECAUSE
    )
    if schemes:
        first = schemes[0]
        layout.bits, layout.group_size, layout.strategy = first.bits, first.group_size, first.strategy
        layout.symmetric = all(scheme.symmetric for scheme in schemes)
        layout.activation_order = any(scheme.has_order for scheme in schemes)
        layout.activation_bits = first.input_bits
    for name in modules_with(tensors, "weight_packed"):
        _read_packed(layout, tensors, name, schemes)
    for name in modules_with(tensors, "weight"):
        weight = tensors[f"{name}.weight"]
        if weight.dtype in ("I8", "F8_E4M3", "F8_E5M2") and len(weight.shape) == 2:
            _read_plain(layout, tensors, name, weight, schemes)
    return layout


def _schemes(config: QuantizationConfig) -> list[_Scheme]:
    groups = config.inner("config_groups")
    if groups is None:
        return []
    if len(groups.raw) > _MAX_GROUPS:
        raise config.corrupt("config_groups", f"must have at most {_MAX_GROUPS} groups", len(groups.raw))
    schemes = []
    for name in groups.raw:
        group = groups.inner(name)
        weights = group.inner("weights") if group else None
        if group is None or weights is None:
            continue
        bits = weights.whole("num_bits", low=1, high=16, default=8)
        size = weights.whole("group_size", low=-1, high=1 << 20, default=0)
        assert bits is not None
        assert size is not None
        inputs = group.inner("input_activations")
        input_bits = inputs.whole("num_bits", low=1, high=16, default=8) if inputs else 0
        order = weights.raw.get("actorder")
        schemes.append(
            _Scheme(
                bits=bits,
                is_float=weights.text("type", default="int") == "float",
                symmetric=weights.flag("symmetric", default=True),
                strategy=weights.text(
                    "strategy", default="group" if size > 0 else "channel" if size else "tensor"
                ),
                group_size=max(size, 0),
                block=_block(weights),
                has_order=order is True or order in ("group", "weight"),
                input_bits=input_bits or 0,
            )
        )
    return schemes


def _block(weights: QuantizationConfig) -> tuple[int, int] | None:
    value = weights.raw.get("block_structure")
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(n) is int and 0 < n < 1 << 20 for n in value)
    ):
        raise weights.corrupt("block_structure", "must be two sizes", value)
    return value[0], value[1]


def _read_packed(layout: QuantizedLayout, tensors: Tensors, name: str, schemes: list[_Scheme]) -> None:
    packed, scale, order, *_ = layout.take(
        tensors,
        name,
        "weight_packed",
        "weight_scale",
        "weight_g_idx",
        "weight_shape",
        "weight_zero_point",
        "weight_min",
        "weight_global_scale",
        "input_global_scale",
        "input_scale",
    )
    if packed is None or len(packed.shape) != 2 or packed.dtype not in ("I32", "U8"):
        layout.problems.append(f"{name}.weight_packed is no matrix of packed numbers")
        return
    outputs, words = packed.shape
    if packed.dtype == "U8":
        _read_packed_floats(layout, name, packed, scale, schemes)
        return
    tried = []
    for scheme in schemes:
        if scheme.is_float:
            continue
        has_order = order is not None and len(order.shape) == 1
        inputs = order.shape[0] if order is not None and has_order else _inputs_of(scale, scheme, words)
        if -(-inputs * scheme.bits // 32) != words:
            tried.append(f"{inputs} inputs at {scheme.bits} bits take {-(-inputs * scheme.bits // 32)} words")
        elif due := _scale_problem(scale, scheme, outputs, inputs):
            tried.append(due)
        else:
            layout.layers[name] = QuantizedLayer(outputs * inputs, inputs, outputs, is_filled=not has_order)
            return
    layout.problems.append(
        f"{name}.weight_packed has {words} words a row, which no group means: "
        + ("; ".join(tried[:3]) or "no group is of integers")
    )


def _inputs_of(scale: StoredTensor | None, scheme: _Scheme, words: int) -> int:
    """A row's inputs: what its words hold, less what only fills its last group up."""
    held = words * 32 // scheme.bits
    if scheme.strategy == "group" and scheme.group_size and scale is not None and len(scale.shape) == 2:
        return min(held, scale.shape[1] * scheme.group_size)
    return held


def _read_packed_floats(
    layout: QuantizedLayout,
    name: str,
    packed: StoredTensor,
    scale: StoredTensor | None,
    schemes: list[_Scheme],
) -> None:
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    groups = {scheme.group_size for scheme in schemes if scheme.is_float and scheme.bits == 4}
    form = next((form for form in _PACKED_FLOATS if form in layout.format), "")
    groups |= {_PACKED_FLOATS[form]} if form and not groups - {0} else set()
    if not groups - {0}:
        layout.problems.append(f"{name}.weight_packed has 4-bit floats, which no group means")
        return
    if scale is None or scale.shape not in {(outputs, -(-inputs // group)) for group in groups if group}:
        found = "missing" if scale is None else list(scale.shape)
        layout.problems.append(
            f"{name}.weight_scale is {found}; {inputs} inputs in groups of {max(groups)} mean "
            f"[{outputs}, {-(-inputs // max(groups))}]"
        )
        return
    layout.layers[name] = QuantizedLayer(outputs * inputs, inputs, outputs)


def _read_plain(
    layout: QuantizedLayout, tensors: Tensors, name: str, weight: StoredTensor, schemes: list[_Scheme]
) -> None:
    _, scale, *_ = layout.take(
        tensors,
        name,
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "output_scale",
    )
    outputs, inputs = weight.shape
    is_float = weight.dtype.startswith("F8")
    tried = []
    for scheme in schemes:
        if scheme.bits > 8 or scheme.is_float != is_float:
            tried.append(f"a group has {scheme.bits}-bit {'floats' if scheme.is_float else 'integers'}")
        elif due := _scale_problem(scale, scheme, outputs, inputs):
            tried.append(due)
        else:
            layout.layers[name] = QuantizedLayer(outputs * inputs, inputs, outputs)
            return
    layout.problems.append(
        f"{name}.weight is {weight.dtype} {list(weight.shape)}, which no group means: "
        + ("; ".join(tried[:3]) or "there is no group")
    )


def _scale_problem(scale: StoredTensor | None, scheme: _Scheme, outputs: int, inputs: int) -> str:
    """What is wrong with the scales for that strategy; "": nothing."""
    if scale is None:
        return "its weight_scale is missing"
    due: tuple[tuple[int, ...], ...] = ((outputs, 1), (outputs,))
    if scheme.strategy == "tensor":
        due = ((1,), (), (1, 1))
    elif scheme.strategy in ("group", "tensor_group") and scheme.group_size:
        due = ((outputs, -(-inputs // scheme.group_size)),)
    elif scheme.strategy == "block" and scheme.block:
        rows, columns = scheme.block
        due = ((-(-outputs // rows), -(-inputs // columns)),)
    if scale.shape in due:
        return ""
    return f"its weight_scale is {list(scale.shape)} where {scheme.strategy} scales are {list(due[0])}"
