"""The tensors of a canonical folder as they are stored: floats, and what the quantised products are made of.

Of a product `<name>` with O outputs, I inputs and g groups:

    int8    <name>.weight         I8  [O, I]
            <name>.weight_scale   F32 [O, g]
    int4    <name>.weight_packed  I32 [O, ceil(I / 8)]   eight a word, the first in the lowest bits
            <name>.weight_scale   BF16 [O, g]
            <name>.weight_min     BF16 [O, g]
            <name>.weight_shape   I64 [2]                O and I
    mxfp4   <name>.weight_packed  U8  [O, ceil(I / 2)]   two a byte, the first in the lower half
            <name>.weight_scale   U8  [O, g]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treadle.models.config import ModelConfig
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import AnyConfig, expected_tensors
from treadle.models.llama import EMBEDDING, Shape
from treadle.models.quantization_config import Quantization, form_of, group_size

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class StoredLayout:
    """A tensor's shape, and its type as safetensors name it; "": any of the floats."""

    shape: Shape
    dtype: str = ""


def quantized_products(config: ModelConfig, quantization: Quantization) -> dict[str, Quantization]:
    """The products whose weights are quantised, and how; a head of its own where the embedding is it.

    What is looked up is not what is multiplied: the embedding stays as it is.
    """
    names = [
        name.removesuffix(_WEIGHT)
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2 and name != EMBEDDING
    ]
    names += ["lm_head"] if config.tie_word_embeddings else []
    return {name: form for name in names if (form := form_of(quantization, name.rsplit(".", 1)[-1]))}


def parts_of(product: str, shape: Shape, form: Quantization) -> Mapping[str, StoredLayout]:
    """What a quantised product's weights [O, I] are stored as."""
    outputs, inputs = shape
    groups = -(-inputs // group_size(form, inputs))
    weight, scale = f"{product}.weight", f"{product}.weight_scale"
    packed, minimum, sizes = f"{product}.weight_packed", f"{product}.weight_min", f"{product}.weight_shape"
    if form == "int8":
        return {weight: StoredLayout(shape, "I8"), scale: StoredLayout((outputs, groups), "F32")}
    if form == "int4":
        return {
            packed: StoredLayout((outputs, -(-inputs // 8)), "I32"),
            scale: StoredLayout((outputs, groups), "BF16"),
            minimum: StoredLayout((outputs, groups), "BF16"),
            sizes: StoredLayout((2,), "I64"),
        }
    return {
        packed: StoredLayout((outputs, -(-inputs // 2)), "U8"),
        scale: StoredLayout((outputs, groups), "U8"),
    }


def stored_tensors(config: AnyConfig) -> dict[str, StoredLayout]:
    """Every tensor that a canonical folder with this configuration must hold; an encoder's are all floats."""
    if isinstance(config, EncoderConfig):
        return {name: StoredLayout(shape) for name, shape in expected_tensors(config).items()}
    quantized = quantized_products(config, config.quantization)
    stored: dict[str, StoredLayout] = {}
    for name, shape in expected_tensors(config).items():
        product = name.removesuffix(_WEIGHT)
        if product in quantized and name.endswith(_WEIGHT):
            stored |= parts_of(product, shape, quantized[product])
        else:
            stored[name] = StoredLayout(shape)
    return stored
