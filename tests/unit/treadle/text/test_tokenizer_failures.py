"""Tokenizers that load, and fail on a text: an error of the model's, and never a panic that passes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from treadle.errors import FailedPrecondition
from treadle.text.tokenizer import Tokenizer, backend_from_bytes

WORDS: dict[str, Any] = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}
MISSING_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
BACKTRACKING = {
    "type": "Split",
    "pattern": {"Regex": "(a+)+$"},
    "behavior": "Isolated",
    "invert": False,
}


def load(folder: Path, **changes: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(WORDS | changes))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}, "b"),
        ({"model": {"type": "Unigram", "vocab": []}}, "b"),
        ({"post_processor": MISSING_TOKEN}, "a"),
        ({"pre_tokenizer": BACKTRACKING}, "a" * 40 + "!"),
    ],
    ids=["no unknown word", "no word at all", "a special token that is none", "backtracking without end"],
)
def test_encoding(tmp_path: Path, changes: dict[str, Any], text: str):
    tokenizer = load(tmp_path, **changes)
    for encode in (tokenizer.encode_batch, tokenizer.encode_whole):
        with pytest.raises(FailedPrecondition, match="fails on this input") as caught:
            encode([text])
        assert caught.value.reason == "TOKENIZER_FAILED"


def test_decoding(tmp_path: Path):
    tokenizer = load(tmp_path, decoder={"type": "Strip", "content": "a", "start": 9, "stop": 9})
    for ids in ([0, 0], [0] * 5000):
        with pytest.raises(FailedPrecondition) as caught:
            tokenizer.decode(ids)
        assert caught.value.reason == "TOKENIZER_FAILED"


def test_loading(tmp_path: Path):
    with pytest.raises(FailedPrecondition) as caught:
        load(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    assert caught.value.reason == "TOKENIZER_NOT_LOADABLE"
    for content in (b"", b"{", b"\xff", b"[]", b"null"):
        with pytest.raises(ValueError):
            backend_from_bytes(content)


def test_faults_of_the_callers_stay_what_they_are(tmp_path: Path):
    tokenizer = load(tmp_path)
    with pytest.raises(TypeError):
        tokenizer.encode_whole([["a", 7]])  # type: ignore[list-item]
