"""The description of a quantised model: read back, and nothing else taken for it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from treadle.errors import FailedPrecondition
from treadle.models.config import parse_config
from treadle.models.llama import EMBEDDING, expected_tensors
from treadle.models.quantization_config import FORMS, KEY, quantization_config
from treadle.models.stored_weights import quantized_products, stored_tensors

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 1000,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 2,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
}


def described(form: str, **changes: Any) -> dict[str, Any]:
    """config.json of such a model, as it is written."""
    raw = CONFIG | changes
    description = quantization_config(next(one for one in FORMS if one == form), parse_config(raw))
    return json.loads(json.dumps(raw | {KEY: description}))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form):
    raw = described(form)
    assert parse_config(raw).quantization == form
    assert parse_config(CONFIG).quantization == ""
    groups = raw[KEY]["config_groups"].values()
    sizes = {(group["weights"]["num_bits"], group["weights"]["group_size"]) for group in groups}
    # 960 = 10 * 96; 2560 is no multiple of 96.
    assert sizes == {"int8": {(8, 96), (8, 64)}, "int4": {(4, 32), (8, 96)}, "mxfp4": {(4, 32)}}[form]
    assert raw[KEY]["ignore"] == (["lm_head"] if form == "mxfp4" else [])
    print(json.dumps(raw[KEY], indent=1))


def test_nothing_else_is_taken_for_ours():
    refused = 0
    for form in FORMS:
        changes = [
            lambda one: one.update(version="0.9.3"),
            lambda one: one["config_groups"]["group_0"]["weights"].update(group_size=128),
            lambda one: one["config_groups"]["group_0"]["weights"].update(observer="minmax"),
            lambda one: one["ignore"].append("model.layers.0.mlp.up_proj"),
            lambda one: one.pop("quantization_status"),
        ]
        for change in changes:
            raw = copy.deepcopy(described(form))
            change(raw[KEY])
            with pytest.raises(FailedPrecondition) as caught:
                parse_config(raw)
            assert caught.value.reason == "UNSUPPORTED_QUANTIZATION"
            refused += 1
    # A head of few bits cannot be the embedding.
    with pytest.raises(FailedPrecondition):
        parse_config(described("int8", tie_word_embeddings=False) | {"tie_word_embeddings": True})
    assert parse_config(described("mxfp4", tie_word_embeddings=True)).quantization == "mxfp4"
    print(f"{refused} refused")


@pytest.mark.parametrize("form", FORMS)
def test_stored_tensors(form):
    config = parse_config(described(form))
    expected, stored = expected_tensors(config), stored_tensors(config)
    products = quantized_products(config, config.quantization)
    assert set(products.values()) == ({"int8", "int4"} if form == "int4" else {form})
    assert len(products) == 2 * 7 + (form != "mxfp4")
    floats = [name for name, layout in stored.items() if not layout.dtype]
    assert set(floats) == {name for name in expected if name.removesuffix(".weight") not in products}
    assert EMBEDDING in floats
    assert all(stored[name].shape == expected[name] for name in floats)
    down = "model.layers.1.mlp.down_proj"
    parts = {name.removeprefix(down): layout for name, layout in stored.items() if name.startswith(down)}
    shapes = {name: (layout.dtype, layout.shape) for name, layout in parts.items()}
    assert (
        shapes
        == {
            "int8": {".weight": ("I8", (960, 2560)), ".weight_scale": ("F32", (960, 40))},
            "int4": {
                ".weight_packed": ("I32", (960, 320)),
                ".weight_scale": ("BF16", (960, 80)),
                ".weight_min": ("BF16", (960, 80)),
                ".weight_shape": ("I64", (2,)),
            },
            "mxfp4": {".weight_packed": ("U8", (960, 1280)), ".weight_scale": ("U8", (960, 80))},
        }[form]
    )
