"""`quantization_config` of a quantised artifact's config.json: what is quantised, and how.

In the words of compressed-tensors, so that other tools can tell what the weights are. What is read is exactly
what is written here: another tool's numbers, even under the same words, are not ours.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from treadle.models.config import ModelConfig

Quantization = Literal["", "int8", "int4", "mxfp4"]

KEY = "quantization_config"
FORMS: tuple[Quantization, ...] = ("int8", "int4", "mxfp4")
HEAD = "lm_head"
_VERSION = "treadle-1"
_FORMATS = {"int8": "int-quantized", "int4": "pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
_MIXED = "mixed-precision"
_INT8_GROUPS = (96, 64)
"""The first that divides a product's inputs, else the last: each group costs time, and each input of one
precision."""
_FOUR_BIT_GROUP = 32


def group_size(quantization: str, in_features: int) -> int:
    """Inputs that share a scale, of a row and of an output's weights; 0: no quantisation."""
    if quantization == "int8":
        return next((size for size in _INT8_GROUPS if in_features % size == 0), _INT8_GROUPS[-1])
    return _FOUR_BIT_GROUP if quantization in ("int4", "mxfp4") else 0


def form_of(quantization: Quantization, module: str) -> Quantization:
    """How a product's weights are stored in an artifact of that quantisation; "": as floats."""
    if module != HEAD:
        return quantization
    # Four bits are too few for the head: most of what they would cost in perplexity is lost there.
    return "" if quantization == "mxfp4" else "int8" if quantization else ""


def quantization_config(quantization: Quantization, config: ModelConfig) -> dict[str, Any]:
    """The description of that quantisation of the model."""
    groups: dict[tuple[Quantization, int], list[str]] = {}
    ignored = []
    for product, inputs in _inputs(config).items():
        if form := form_of(quantization, product):
            groups.setdefault((form, group_size(form, inputs)), []).append(product)
        else:
            ignored.append(product)
    formats = {_FORMATS[form] for form, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": {
                "targets": [f"re:.*{re.escape(product)}$" for product in products],
                "format": _FORMATS[form],
                "weights": _weights(form, size),
            }
            for number, ((form, size), products) in enumerate(groups.items())
        },
    }


def _inputs(config: ModelConfig) -> dict[str, int]:
    """The inputs of every kind of product, by the last part of its name."""
    hidden = config.hidden_size
    attended = config.num_attention_heads * config.head_dim
    return {
        "q_proj": hidden,
        "k_proj": hidden,
        "v_proj": hidden,
        "o_proj": attended,
        "gate_proj": hidden,
        "up_proj": hidden,
        "down_proj": config.intermediate_size,
        HEAD: hidden,
    }


def _weights(form: Quantization, size: int) -> dict[str, Any]:
    return {
        "num_bits": 8 if form == "int8" else 4,
        "type": "float" if form == "mxfp4" else "int",
        # int4 has a minimum for each group in a zero point's place.
        "symmetric": form != "int4",
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
    }


def read_quantization(raw: object, config: ModelConfig) -> Quantization | None:
    """Which quantisation of the model a `quantization_config` describes; None where it is none of ours."""
    for form in FORMS:
        # A quantised head is a tensor of its own.
        tied = config.tie_word_embeddings and form_of(form, HEAD)
        if raw == quantization_config(form, config) and not tied:
            return form
    return None
