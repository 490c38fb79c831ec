"""Maps that somebody wrote."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import modeling

from treadle.errors import InvalidArgument
from treadle.models.config import parse_config
from treadle.models.device_map_check import check_device_map, place
from treadle.models.families import module_tree
from treadle.models.module_tree import module_bytes, tensor_bytes

RAW: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
TREE = module_tree(parse_config(RAW))
SIZES = tensor_bytes(TREE, "bfloat16")


def test_as_accelerate(rng: random.Random):
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**RAW))
    names = [name for name, _ in model.named_modules() if not name.endswith(("act_fn", "rotary_emb"))]
    whole = 0
    for case in range(400):
        chosen = rng.sample(names, rng.randint(1, 6))
        if case % 2:
            parts = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{n}" for n in range(3))]
            chosen = parts if rng.random() < 0.5 else rng.sample(parts, 5)
        device_map = {name: rng.choice(("0", "1", "cpu")) for name in chosen}
        try:
            modeling.check_device_map(model, dict(device_map))
        except ValueError:
            with pytest.raises(InvalidArgument) as caught:
                check_device_map(TREE, device_map)
            assert caught.value.reason == "PARAMETERS_LEFT_OUT"
        else:
            check_device_map(TREE, device_map)
            whole += 1
    assert 50 < whole < 350
    print(f"{whole} of 400 maps are whole")


def test_strangers_are_named():
    for device_map, reason, named in (
        ({"": "gpu"}, "UNKNOWN_DEVICE", "gpu"),
        ({"": "0", "model.layers.7": "0"}, "UNKNOWN_MODULE", "model.layers.7"),
        ({"model": "0"}, "PARAMETERS_LEFT_OUT", "lm_head.weight"),
        ({}, "PARAMETERS_LEFT_OUT", "model.embed_tokens.weight"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            check_device_map(TREE, device_map)
        assert (caught.value.reason, caught.value.fields[0].field) == (reason, "device_map")
        assert named in caught.value.message


def test_a_whole_map_is_left_as_it_is():
    device_map = {"": "1", "model.layers.1": "cpu", "model.layers.1.mlp.up_proj.weight": "cpu"}
    check_device_map(TREE, device_map)
    placed = place(TREE, SIZES, device_map, {"1": 1e9, "cpu": 1e9})
    sizes = module_bytes(SIZES)
    assert placed.device_map == device_map
    assert placed.used_bytes == {
        "1": sizes[""] - sizes["model.layers.1"],
        "cpu": sizes["model.layers.1"],
    }
    assert placed.warnings == ()


def test_what_should_be_known():
    device_map = {"": "0", "model.embed_tokens": "1", "model.layers.2.mlp": "1"}
    check_device_map(TREE, device_map)
    ties, blocks, room = place(TREE, SIZES, device_map, {"0": 100, "1": 1e9}).warnings
    assert "lm_head.weight is model.embed_tokens.weight" in ties
    assert "model.layers.2" in blocks
    assert "has 100" in room
    used = place(TREE, SIZES, device_map, {}).used_bytes
    assert sum(used.values()) == module_bytes(SIZES)[""] + SIZES["model.embed_tokens.weight"]
