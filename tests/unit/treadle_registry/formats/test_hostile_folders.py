"""Folders that were made to break what reads them: each is refused by name, quickly and in little memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from treadle.errors import TreadleError
from treadle.models.config import parse_config
from treadle.models.llama import expected_tensors
from treadle_registry.operations.importing import import_source
from treadle_registry.operations.job import Imported, event_from_json, event_to_json
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Published, Store

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
WEIGHTS = {name: np.ones(shape, np.float32) for name, shape in expected_tensors(parse_config(CONFIG)).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that can be imported."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file(WEIGHTS, made / "model.safetensors")
    return made


def write(name: str, content: object) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()

    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    return write("config.json", CONFIG | changes)


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    return write("tokenizer.json", TOKENIZER | changes)


def many_files(folder: Path) -> None:
    for number in range(1100):
        (folder / f"more-{number}.json").touch()


def many_templates(folder: Path) -> None:
    templates = [{"name": f"t{number}", "template": "x"} for number in range(33)]
    write("tokenizer_config.json", {"chat_template": templates})(folder)


def long_name(folder: Path) -> None:
    save_file(WEIGHTS | {"x" * 3_000_000: np.ones(1, np.float32)}, folder / "model.safetensors")


def many_tensors(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"tensor-{number}": entry for number in range(60_000)}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def folder_for_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def link_to_a_device(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")


def link_to_itself(folder: Path) -> None:
    (folder / "extra.json").symlink_to("extra.json")


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
HALF = b'{"chat_template": "\\ud800"}'
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "half a character in a template": (
        write("tokenizer_config.json", HALF),
        "CORRUPT_CONFIG",
        "half a character",
    ),
    "half a character in the config": (config(other="\ud800"), "CORRUPT_CONFIG", "config.json"),
    "half a character in UTF-8": (
        write("config.json", json.dumps(CONFIG)[:-1].encode() + b', "x": "\xed\xa0\x80"}'),
        "CORRUPT_CONFIG",
        "config.json",
    ),
    "half a character in the defaults": (
        write("generation_config.json", b'{"x": "\\uDFFF"}'),
        "CORRUPT_CONFIG",
        "generation_config.json",
    ),
    "half a character in the vocabulary": (
        write("tokenizer.json", json.dumps(TOKENIZER).replace('"a"', '"\\ud800"').encode()),
        "CORRUPT_CONFIG",
        "tokenizer.json",
    ),
    "not a number": (config(rms_norm_eps=float("nan")), "CORRUPT_CONFIG", "rms_norm_eps"),
    "infinite": (config(rope_theta=float("inf")), "CORRUPT_CONFIG", "rope_theta"),
    "a billion layers": (config(num_hidden_layers=10**9), "CORRUPT_CONFIG", "num_hidden_layers"),
    "a type that is a list": (config(model_type=["llama"]), "UNSUPPORTED_ARCHITECTURE", "llama"),
    "an activation that is an object": (config(hidden_act={}), "UNSUPPORTED_ARCHITECTURE", "hidden_act"),
    "a rope that is a list": (config(rope_scaling=[1]), "CORRUPT_CONFIG", "rope_scaling"),
    "ids that are fractions": (config(eos_token_id=1.5), "CORRUPT_CONFIG", "eos_token_id"),
    "thousands of ids": (config(eos_token_id=[1] * 5000), "CORRUPT_CONFIG", "eos_token_id"),
    "brackets": (write("config.json", b"[" * 100_000), "CORRUPT_CONFIG", "config.json"),
    "a number of 5,000 digits": (
        write("config.json", b'{"a": ' + b"1" * 5000 + b"}"),
        "CORRUPT_CONFIG",
        "config.json",
    ),
    "a long config": (config(other="x" * (1 << 20)), "CORRUPT_CONFIG", "config.json"),
    "a config that grows": (config(other=[1] * 250_000), "FILE_TOO_LARGE", "config.json"),
    "a long type": (config(hidden_act="x" * 900_000), "UNSUPPORTED_ARCHITECTURE", "hidden_act"),
    "a long template": (write("chat_template.jinja", b"x" * (1 << 21)), "FILE_TOO_LARGE", "chat template"),
    "many templates": (many_templates, "FILE_TOO_LARGE", "33 chat templates"),
    "a panic in the tokenizer": (tokenizer(normalizer=PRECOMPILED), "CORRUPT_TOKENIZER", "charsmap"),
    "half an expression": (
        tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "CORRUPT_TOKENIZER",
        "parenthesis",
    ),
    "brackets in the tokenizer": (
        write("tokenizer.json", b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}"),
        "CORRUPT_CONFIG",
        "tokenizer.json",
    ),
    "many files": (many_files, "TOO_MANY_FILES", "at most 1024"),
    "a tensor's name of 3 MB": (long_name, "UNSUPPORTED_TENSOR", "xxx"),
    "60,000 tensors": (many_tensors, "CORRUPT_WEIGHTS", "lack the tensor"),
    "an index of lists": (
        write("model.safetensors.index.json", {"weight_map": {"a": ["b.safetensors"]}}),
        "CORRUPT_WEIGHTS",
        "weight_map",
    ),
    "an index to itself": (
        write("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors.index.json"}}),
        "CORRUPT_WEIGHTS",
        "weight_map",
    ),
    "a folder for a file": (folder_for_a_file, "MISSING_FILE", "config.json"),
    "a link to a device": (link_to_a_device, "PATH_OUTSIDE", "/dev/zero"),
    "a link to itself": (link_to_itself, "MISSING_FILE", "extra.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, folder: Path, case: str):
    change, reason, named = REFUSED[case]
    change(folder)
    store = Store.open(tmp_path / "store")
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(TreadleError) as caught:
        import_source(store, LocalSource("folder", str(folder)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    took = time.process_time() - started
    error = caught.value
    assert error.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert error.reason == reason
    assert named in error.message
    assert {path.name for path in store.root.rglob("*") if path.is_file()} == {"store.lock", "format.json"}
    # What a process says of it is one line, and not a long one.
    assert len(json.dumps(event_to_json(error))) < 10_000
    assert took < 5
    assert peak < 100 << 20


TAKEN: dict[str, tuple[Callable[[Path], None], Callable[[Published], object], object]] = {
    "ends past the vocabulary": (
        config(eos_token_id=[3, 40, 10**6]),
        lambda found: found.manifest.defaults.eos_token_ids,
        (3,),
    ),
    "a whole character in two halves": (
        write("tokenizer_config.json", b'{"chat_template": "\\ud83d\\ude42"}'),
        lambda found: (found.canonical_folder / "chat_template.jinja").read_text(),
        "🙂",
    ),
    "a long licence": (
        write("README.md", b"---\nlicense: " + b"a" * 1_000_000 + b"\n---\n"),
        lambda found: len(found.manifest.facts.license),
        100,
    ),
    "a long class": (
        config(architectures=["C" * 100_000]),
        lambda found: len(found.manifest.facts.architecture),
        100,
    ),
    "names that are no text": (
        lambda folder: (folder / os.fsdecode(b"\xff\xfe.json")).touch(),
        lambda found: [file.path for file in found.manifest.source_files],
        ["config.json", "model.safetensors", "tokenizer.json"],
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_taken_without_harm(tmp_path: Path, folder: Path, case: str):
    change, look, expected = TAKEN[case]
    change(folder)
    published = import_source(Store.open(tmp_path / "store"), LocalSource("folder", str(folder)))
    assert look(published) == expected
    line = json.dumps(event_to_json(Imported(published.manifest)))
    assert event_from_json(json.loads(line)) == Imported(published.manifest)
    assert len(line) < 20_000
