"""Hugging Face folders: what comes in, what is refused."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - makes what must be refused
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from treadle.errors import TreadleError
from treadle.models.config import parse_config
from treadle.models.llama import expected_tensors
from treadle.nn.loader import weight_files
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Published, Store

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "eos_token_id": 3,
}
TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    "truncation": None,
    "padding": None,
}


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(parse_config(CONFIG))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, made: dict[str, torch.Tensor] | None = None, shards: int = 1, **files: Any) -> Path:
    """A folder; `files` replace or add (name with "__" for "."), None removes."""
    folder.mkdir()
    made = tensors() if made is None else made
    names = list(made)
    if shards == 1:
        save_file(made, folder / "model.safetensors")
    else:
        weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(names)}
        for shard in set(weight_map.values()):
            save_file({name: made[name] for name in names if weight_map[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    contents = {"config__json": CONFIG, "tokenizer__json": TOKENIZER} | files
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        if content is None:
            path.unlink(missing_ok=True)
        else:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            path.write_bytes(data)
    return folder


def imported(store: Path, folder: Path) -> Published:
    return import_source(Store.open(store), LocalSource("folder", str(folder)))


def stored(published: Published) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(published.canonical_folder):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_become_bfloat16(tmp_path: Path, dtype: torch.dtype, shards: int):
    made = tensors(dtype=dtype)
    published = imported(tmp_path / "store", write(tmp_path / "model", made, shards))
    result = stored(published)
    assert result.keys() == made.keys()
    for name, value in result.items():
        assert torch.equal(value, made[name].to(torch.bfloat16)), name
    source = published.canonical_folder.parent / "source"
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "model").iterdir()}
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes()
    weights = weight_files(published.canonical_folder)
    assert len(weights) == (shards if dtype == torch.bfloat16 else 1)
    originals = [path for path in source.iterdir() if path.suffix == ".safetensors"]
    shared = [path for path in weights if any(path.samefile(original) for original in originals)]
    assert shared == (weights if dtype == torch.bfloat16 else [])


def test_the_digest_is_of_what_is_in_the_model(tmp_path: Path):
    bf16 = tensors(dtype=torch.bfloat16)
    as_float = {name: value.float() for name, value in bf16.items()}
    template = {"chat_template": "{{ messages }}"}
    variants = {
        "single": write(tmp_path / "a", bf16),
        "sharded": write(tmp_path / "b", bf16, 2),
        "float32": write(tmp_path / "c", as_float),
        "padded": write(
            tmp_path / "d",
            bf16,
            tokenizer__json=TOKENIZER | {"padding": _PADDING},
            config__json=CONFIG | {"transformers_version": "9.9"},
        ),
        "template": write(tmp_path / "e", bf16, tokenizer_config__json=template),
        "tokens": write(
            tmp_path / "f",
            bf16,
            tokenizer__json=TOKENIZER
            | {"model": {"type": "WordLevel", "vocab": {"a": 0, "c": 1}, "unk_token": "a"}},
        ),
        "weights": write(tmp_path / "g", tensors(seed=1)),
        "config": write(tmp_path / "h", bf16, config__json=CONFIG | {"rms_norm_eps": 1e-3}),
    }
    found = {
        name: imported(tmp_path / f"store-{name}", folder).manifest.digests
        for name, folder in variants.items()
    }
    base = found["single"]
    assert base is not None
    assert all(found[name] == base for name in ("sharded", "float32", "padded"))
    changed = {
        name: [
            part
            for part in ("compute", "tokenizer", "presentation")
            if getattr(digests, part) != getattr(base, part)
        ]
        for name, digests in found.items()
    }
    assert changed["template"] == ["presentation"]
    assert changed["tokens"] == ["tokenizer"]
    assert changed["weights"] == ["compute"]
    assert changed["config"] == ["compute"]
    assert len({digests.artifact for digests in found.values() if digests}) == 5


_PADDING = {
    "strategy": {"Fixed": 128},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "a",
}


def test_text_parts(tmp_path: Path):
    folder = write(
        tmp_path / "model",
        tokenizer__json=TOKENIZER | {"padding": _PADDING},
        tokenizer_config__json={
            "bos_token": "a",
            "chat_template": [
                {"name": "default", "template": "old"},
                {"name": "tool_use", "template": "tools"},
            ],
        },
        chat_template__jinja=b"{{ new }}",
        generation_config__json={"temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": [3, 4]},
        README__md=b"---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\nlicense: other\n",
    )
    published = imported(tmp_path / "store", folder)
    canonical = published.canonical_folder
    assert json.loads((canonical / "tokenizer.json").read_text())["padding"] is None
    assert json.loads((canonical / "tokenizer_config.json").read_text()) == {"bos_token": "a"}
    assert (canonical / "chat_template.jinja").read_text() == "{{ new }}"
    assert (canonical / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    defaults = published.manifest.defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 0.9)
    assert defaults.eos_token_ids == (3, 4)
    facts = published.manifest.facts
    assert (facts.license, facts.has_chat_template) == ("apache-2.0", True)
    assert facts.parameters == sum(value.numel() for value in tensors().values())


def _broken_safetensors(change: Callable[[dict[str, Any]], None]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name, value in tensors(dtype=torch.bfloat16).items():
        size = value.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, at + size]}
        at += size
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def _set(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


HEAD = "lm_head.weight"
WEIGHTS: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "CORRUPT_WEIGHTS", "claims 0"),
    "header past the end": ((1 << 60).to_bytes(8, "little") + bytes(90), "CORRUPT_WEIGHTS", "claims"),
    "header no JSON": ((8).to_bytes(8, "little") + b"[[[[[[[[", "CORRUPT_WEIGHTS", "not an object"),
    "header a list": ((2).to_bytes(8, "little") + b"[]", "CORRUPT_WEIGHTS", "not an object"),
    "deep header": ((90000).to_bytes(8, "little") + b"[" * 90000, "CORRUPT_WEIGHTS", "not an object"),
    "offsets past the end": (
        _broken_safetensors(_set(HEAD, data_offsets=[0, 1 << 62])),
        "CORRUPT_WEIGHTS",
        HEAD,
    ),
    "negative offset": (_broken_safetensors(_set(HEAD, data_offsets=[-2, 2])), "CORRUPT_WEIGHTS", HEAD),
    "shape of the wrong size": (
        _broken_safetensors(_set(HEAD, shape=[1 << 40, 1 << 40])),
        "CORRUPT_WEIGHTS",
        HEAD,
    ),
    "unknown dtype": (_broken_safetensors(_set(HEAD, dtype="F7")), "CORRUPT_WEIGHTS", "'F7'"),
    "truncated": (_broken_safetensors(lambda header: None)[:-1], "CORRUPT_WEIGHTS", "truncated"),
    "longer": (_broken_safetensors(lambda header: None) + b"x", "CORRUPT_WEIGHTS", "end at byte"),
    "hole": (_broken_safetensors(lambda header: header.pop(HEAD)), "CORRUPT_WEIGHTS", ""),
    "transposed": (_broken_safetensors(_set(HEAD, shape=[32, 50])), "CORRUPT_WEIGHTS", HEAD),
    "integers": (_broken_safetensors(_set(HEAD, dtype="I16")), "UNSUPPORTED_DTYPE", HEAD),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_corrupt_weights(tmp_path: Path, case: str):
    data, reason, named = WEIGHTS[case]
    folder = write(tmp_path / "model", model__safetensors=data)
    refuse(tmp_path, folder, reason, named)


def refuse(tmp_path: Path, folder: Path, reason: str, named: str) -> None:
    """Asserts the refusal, and that the store has nothing of it."""
    with pytest.raises(TreadleError) as caught:
        imported(tmp_path / "store", folder)
    assert caught.value.reason == reason
    assert named in caught.value.message
    left = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"store.lock", "format.json"}


FILES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no config": ({"config__json": None}, "MISSING_FILE", "config.json"),
    "no tokenizer": ({"tokenizer__json": None}, "MISSING_FILE", "tokenizer.json"),
    "no weights": ({"model__safetensors": None}, "MISSING_FILE", "model.safetensors"),
    "pickle": (
        {"model__safetensors": None, "pytorch_model__bin": pickle.dumps({"a": 1})},
        "PICKLE_WEIGHTS",
        "save_pretrained",
    ),
    "remote code": (
        {"config__json": CONFIG | {"auto_map": {"AutoModel": "x.Y"}}},
        "REMOTE_CODE",
        "auto_map",
    ),
    "remote tokenizer": (
        {"tokenizer_config__json": {"auto_map": {"AutoTokenizer": ["x.Y", None]}}},
        "REMOTE_CODE",
        "auto_map",
    ),
    "architecture": ({"config__json": CONFIG | {"model_type": "t5"}}, "UNSUPPORTED_ARCHITECTURE", "t5"),
    "quantised": (
        {"config__json": CONFIG | {"quantization_config": {"bits": 4}}},
        "UNSUPPORTED_QUANTIZATION",
        "quantised",
    ),
    "config no JSON": ({"config__json": b"{"}, "CORRUPT_CONFIG", "config.json"),
    "config a list": ({"config__json": b"[]"}, "CORRUPT_CONFIG", "config.json"),
    "config of bytes": ({"config__json": b"\xff\xfe\x00"}, "CORRUPT_CONFIG", "config.json"),
    "another size": ({"config__json": CONFIG | {"intermediate_size": 49}}, "CORRUPT_WEIGHTS", "shape"),
    "more layers": ({"config__json": CONFIG | {"num_hidden_layers": 3}}, "CORRUPT_WEIGHTS", "layers.2"),
    "fewer layers": ({"config__json": CONFIG | {"num_hidden_layers": 1}}, "UNSUPPORTED_TENSOR", "layers.1"),
    "tokenizer": ({"tokenizer__json": {"model": {"type": "Odd"}}}, "CORRUPT_TOKENIZER", "tokenizer.json"),
    "temperature": (
        {"generation_config__json": {"temperature": "hot"}},
        "CORRUPT_CONFIG",
        "temperature",
    ),
    "template's name": (
        {"tokenizer_config__json": {"chat_template": [{"name": "../../x", "template": "t"}]}},
        "PATH_OUTSIDE",
        "../../x",
    ),
    "index outside": (
        {"model.safetensors.index__json": {"weight_map": {"a": "../b.safetensors"}}},
        "PATH_OUTSIDE",
        "../b.safetensors",
    ),
    "index absolute": (
        {"model.safetensors.index__json": {"weight_map": {"a": "/etc/b.safetensors"}}},
        "PATH_OUTSIDE",
        "/etc/b.safetensors",
    ),
    "index NUL": (
        {"model.safetensors.index__json": {"weight_map": {"a": "b\0.safetensors"}}},
        "PATH_OUTSIDE",
        "index",
    ),
    "index Unicode": (
        {"model.safetensors.index__json": {"weight_map": {"a": "․․∕b.safetensors"}}},
        "PATH_OUTSIDE",
        "index",
    ),
    "index to pickle": (
        {"model.safetensors.index__json": {"weight_map": {"a": "b.bin"}}},
        "CORRUPT_WEIGHTS",
        "weight_map",
    ),
    "index to nothing": (
        {"model.safetensors.index__json": {"weight_map": {"a": "b.safetensors"}}},
        "MISSING_FILE",
        "b.safetensors",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_refused(tmp_path: Path, case: str):
    files, reason, named = FILES[case]
    refuse(tmp_path, write(tmp_path / "model", **files), reason, named)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "extra.json"])
def test_links_that_leave_the_folder_are_refused(tmp_path: Path, name: str):
    folder = write(tmp_path / "model")
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{}")
    (folder / name).symlink_to(outside)
    refuse(tmp_path, folder, "PATH_OUTSIDE", name)


def test_links_within_the_folder_are_followed(tmp_path: Path):
    folder = write(tmp_path / "model")
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    assert imported(tmp_path / "store", folder).manifest.facts.num_layers == 2


def test_neither_pipe_nor_folder_is_a_file(tmp_path: Path):
    folder = write(tmp_path / "model", tokenizer__json=None)
    os.mkfifo(folder / "tokenizer.json")
    refuse(tmp_path, folder, "MISSING_FILE", "not a regular file")


def test_twice_in_two_shards_is_refused(tmp_path: Path):
    folder = write(tmp_path / "model", shards=2)
    made = tensors()
    save_file(made, folder / "model-0.safetensors")
    refuse(tmp_path, folder, "CORRUPT_WEIGHTS", "another file")


def test_old_tables_are_left_out_and_tied_heads_kept(tmp_path: Path):
    made = tensors()
    made["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = write(tmp_path / "model", made, config__json=CONFIG | {"tie_word_embeddings": True})
    result = stored(imported(tmp_path / "store", folder))
    assert made.keys() - result.keys() == {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert np.isfinite(result[HEAD].float().numpy()).all()
