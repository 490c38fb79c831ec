"""Folders that load, and the name of what is wrong with those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle.errors import DataLoss, FailedPrecondition, TreadleError
from treadle.models.config import read_config
from treadle.models.llama import EMBEDDING, HEAD, expected_tensors
from treadle.models.quantization_config import FORMS, KEY, quantization_config
from treadle.models.stored_weights import stored_tensors
from treadle.nn.loader import INDEX, load_model

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
CPU = torch.device("cpu")
PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shapes = expected_tensors(read_config(tmp_path))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of the single file; None drops one."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def shard(folder: Path) -> list[str]:
    """Splits the single file into three, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{number}.safetensors" for number in range(3)]
    weight_map = {name: files[place % 3] for place, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return files


def refused(folder: Path) -> TreadleError:
    with pytest.raises((DataLoss, FailedPrecondition)) as caught:
        load_model(folder, torch.float32, CPU)
    print(caught.value.message)
    return caught.value


@torch.inference_mode()
def test_single_file_and_shards_give_the_same_model(folder):
    stored = load_file(folder / "model.safetensors")
    for _ in range(2):
        model = load_model(folder, torch.float32, CPU, kernels="torch")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        merged = {name for name in stored if any(f".{part}." in name for part in PARTS)}
        assert len(merged) > len(PARTS)
        assert parameters.keys() > (stored.keys() - merged) | {HEAD}
        assert all(torch.equal(parameters[name], stored[name]) for name in stored.keys() - merged)
        for whole, parts in (("qkv_proj", PARTS[:3]), ("gate_up_proj", PARTS[3:])):
            for first in [name for name in merged if f".{parts[0]}." in name]:
                rows = torch.cat([stored[first.replace(parts[0], part)] for part in parts])
                assert torch.equal(parameters[first.replace(parts[0], whole)], rows)
        assert torch.equal(parameters[HEAD], stored[EMBEDDING])
        if not (folder / INDEX).exists():
            shard(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_weights_are_converted_to_the_dtype_that_was_asked_for(folder, dtype):
    stored = load_file(folder / "model.safetensors")[EMBEDDING]
    model = load_model(folder, dtype, CPU)
    embedding = dict(model.named_parameters())[EMBEDDING]
    assert embedding.dtype is dtype
    assert torch.equal(embedding, stored.to(dtype))


def test_what_follows_from_the_configuration_is_ignored(folder):
    rewrite(
        folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), HEAD: torch.ones(33, 16)}
    )
    model = load_model(folder, torch.float32, CPU, kernels="torch")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert torch.equal(parameters[HEAD], parameters[EMBEDDING])


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({K_PROJ: None}, "MISSING_TENSORS", K_PROJ),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}, "UNEXPECTED_TENSOR", "model.layers.2.mlp"),
        ({"model.layers.0.self_attn.o_proj.bias": torch.ones(16)}, "UNEXPECTED_TENSOR", "o_proj.bias"),
        ({K_PROJ: torch.ones(16, 8)}, "TENSOR_SHAPE", K_PROJ),
        ({K_PROJ: torch.ones(8, 16, dtype=torch.int8)}, "TENSOR_TYPE", K_PROJ),
    ],
    ids=["missing", "unexpected", "bias", "shape", "type"],
)
def test_wrong_tensors_are_named(folder, changes, reason, named):
    rewrite(folder, **changes)
    error = refused(folder)
    assert error.reason == reason
    assert named in error.message


@pytest.fixture(params=FORMS)
def quantised_folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder whose weights are stored in few bits, whatever they say."""
    config = CONFIG | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    description = quantization_config(request.param, read_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {KEY: description}))
    types = {
        "": torch.bfloat16,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "I32": torch.int32,
        "I64": torch.int64,
    }
    tensors = {
        name: torch.randint(0, 100, layout.shape).to(types[layout.dtype])
        for name, layout in stored_tensors(read_config(tmp_path)).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_wrong_tensors_of_few_bits_are_named(quantised_folder: Path, kernels):
    model = load_model(quantised_folder, torch.bfloat16, CPU, kernels=kernels)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    sound = load_file(quantised_folder / "model.safetensors")
    named = 0
    for name in [name for name in sound if "k_proj" in name and "bias" not in name]:
        for tensor, reason in (
            (None, "MISSING_TENSORS"),
            (sound[name][..., :-1].contiguous(), "TENSOR_SHAPE"),
            (sound[name].double(), "TENSOR_TYPE"),
            (sound[name].to(torch.int16), "TENSOR_TYPE"),
        ):
            rewrite(quantised_folder, **{name: tensor})
            error = refused(quantised_folder)
            assert error.reason == reason
            assert name in error.message
            save_file(sound, quantised_folder / "model.safetensors")
            named += 1
    print(f"{named} named")
    assert named >= 2 * 2 * 4


@pytest.mark.parametrize("damage", ["empty", "header", "cut", "text"])
def test_damaged_files_are_named(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "header": b"\xff" * 8 + content[8:], "cut": content[:-100], "text": b"<html>" * 9}[
            damage
        ]
    )
    error = refused(folder)
    assert error.reason == "CORRUPT_WEIGHTS"
    assert "model.safetensors" in error.message


def test_a_missing_file_is_named(folder):
    second = shard(folder)[1]
    (folder / second).unlink()
    assert second in refused(folder).message


def test_a_tensor_in_two_shards_is_named(folder):
    first, second, _ = shard(folder)
    tensors = load_file(folder / second) | {EMBEDDING: torch.ones(33, 16)}
    assert EMBEDDING in load_file(folder / first)
    save_file(tensors, folder / second)
    error = refused(folder)
    assert error.reason == "REPEATED_TENSORS"
    assert EMBEDDING in error.message


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "model.bin",
        "..",
        "",
        7,
        None,
    ],
)
def test_an_index_names_files_of_its_folder_only(folder, name):
    outside = folder.parent / "model.safetensors"
    outside.write_bytes((folder / "model.safetensors").read_bytes())
    shard(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {K_PROJ: name}}))
    assert refused(folder).reason == "CORRUPT_INDEX"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}', "[" * 100_000])
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    assert refused(folder).reason == "CORRUPT_INDEX"
