"""Which files of a repository are the model."""

from __future__ import annotations

import pytest
from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from treadle.errors import InvalidArgument, NotFound
from treadle_registry.sources.hub_files import (
    check_required,
    check_shards,
    index_name,
    shards_of,
    single_name,
    text_files,
    weights_file,
)
from treadle_registry.sources.hub_source import HubSource

TEXTS = ["config.json", "tokenizer.json"]
ANY = HubSource("a/b")


def test_variants_are_named_as_transformers_names_them():
    variants = ["", "fp16", "bf16", "non_ema", "q-1"]
    for variant in variants:
        oracle = variant or None
        assert single_name(variant) == _add_variant(SAFE_WEIGHTS_NAME, oracle)
        assert index_name(variant) == _add_variant(SAFE_WEIGHTS_INDEX_NAME, oracle)
    print(f"{len(variants)} variants")


@pytest.mark.parametrize(
    ("source", "names", "chosen"),
    [
        (ANY, ["model.safetensors"], "model.safetensors"),
        (ANY, ["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (
            ANY,
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            "model.safetensors.index.json",
        ),
        (ANY, ["weights.safetensors", "pytorch_model.bin"], "weights.safetensors"),
        (
            HubSource("a/b", variant="fp16"),
            ["model.safetensors", "model.fp16.safetensors"],
            "model.fp16.safetensors",
        ),
        (
            HubSource("a/b", variant="fp16"),
            [
                "model.safetensors",
                "model.safetensors.index.fp16.json",
                "model.fp16-00001-of-00002.safetensors",
            ],
            "model.safetensors.index.fp16.json",
        ),
        (HubSource("a/b", gguf_file="m.Q8_0.gguf"), ["m.Q4_0.gguf", "m.Q8_0.gguf"], "m.Q8_0.gguf"),
    ],
)
def test_the_weights_that_are_wanted(source: HubSource, names: list[str], chosen: str):
    assert weights_file(source, names) == chosen


@pytest.mark.parametrize(
    ("source", "names", "kind", "reason", "said"),
    [
        (ANY, ["pytorch_model.bin"], InvalidArgument, "PICKLE_WEIGHTS", "refs/pr/N"),
        (
            ANY,
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
            InvalidArgument,
            "PICKLE_WEIGHTS",
            "",
        ),
        (ANY, ["README.md"], InvalidArgument, "MISSING_FILE", "model.safetensors"),
        (ANY, ["m.Q4_0.gguf", "m.Q8_0.gguf"], InvalidArgument, "MISSING_FILE", "m.Q4_0.gguf, m.Q8_0.gguf"),
        (ANY, ["model.fp16.safetensors", "model.x.json"], InvalidArgument, "MISSING_FILE", "one: fp16"),
        (ANY, ["model.safetensors.index.bf16.json"], InvalidArgument, "MISSING_FILE", "one: bf16"),
        (ANY, ["a.safetensors", "b.safetensors"], InvalidArgument, "MISSING_FILE", ""),
        (HubSource("a/b", variant="bf16"), ["model.fp16.safetensors"], NotFound, "VARIANT_NOT_FOUND", "fp16"),
        (HubSource("a/b", gguf_file="x.gguf"), ["m.gguf"], NotFound, "HUB_FILE_NOT_FOUND", "m.gguf"),
        (
            HubSource("a/b", gguf_file="m-00001-of-00002.gguf"),
            ["m-00001-of-00002.gguf"],
            InvalidArgument,
            "SPLIT_GGUF",
            "merge",
        ),
    ],
)
def test_what_cannot_be_taken_says_what_can(
    source: HubSource, names: list[str], kind: type[Exception], reason: str, said: str
):
    with pytest.raises(kind) as raised:
        weights_file(source, names)
    assert raised.value.reason == reason  # type: ignore[attr-defined]
    assert said in str(raised.value)


def test_texts_of_a_model_and_no_others():
    wanted = [
        *TEXTS,
        *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *(
            "vocab.json",
            "vocab.txt",
            "vocab.bpe",
            "encoder.json",
            "spiece.model",
            "sentencepiece.bpe.model",
            "merges.txt",
            "tokenizer.model",
            "chat_template.jinja",
            "chat_template.json",
        ),
        *("README.md", "LICENSE", "LICENSE.txt", "NOTICE"),
    ]
    others = [
        "training_args.bin",
        "trainer_state.json",
        "model.safetensors",
        "x.py",
        "eval.json",
        "LICENSE.bin",
        "a.pkl",
    ]
    assert text_files([*wanted, *others]) == sorted(wanted)
    print(f"{len(wanted)} of {len(wanted) + len(others)}")


@pytest.mark.parametrize("missing", TEXTS)
def test_a_repository_without_what_every_model_has(missing: str):
    with pytest.raises(InvalidArgument, match=missing):
        check_required([name for name in TEXTS if name != missing])


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({}, "CORRUPT_WEIGHTS"),
        ({"weight_map": {}}, "CORRUPT_WEIGHTS"),
        ({"weight_map": []}, "CORRUPT_WEIGHTS"),
        ({"weight_map": {"a": 1}}, "CORRUPT_WEIGHTS"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "CORRUPT_WEIGHTS"),
        ({"weight_map": {"a": "../x.safetensors"}}, "PATH_OUTSIDE"),
        ({"weight_map": {"a": "/x.safetensors"}}, "PATH_OUTSIDE"),
        ({"weight_map": {str(n): f"{n}.safetensors" for n in range(1025)}}, "TOO_MANY_FILES"),
    ],
)
def test_an_index_that_is_none(index: dict[str, object], reason: str):
    with pytest.raises(InvalidArgument) as raised:
        shards_of(index, "model.safetensors.index.json")
    assert raised.value.reason == reason


def test_an_index_that_names_what_is_not_there():
    shards = shards_of({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}, "index")
    check_shards(shards, "index", ["1.safetensors", "2.safetensors"])
    with pytest.raises(InvalidArgument, match=r"2\.safetensors"):
        check_shards(shards, "index", ["1.safetensors"])
