"""A folder with a tokenizer of BERT's kind, and a registry that a test holds in its hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from treadle.text.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over lazy dog and sleeps on a bench near river while it rains".split()


def word_piece() -> Backend:
    """A vocabulary of words, with a pair's special tokens."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = [*specials, *WORDS, "##s", "##ly", ".", ",", "👍"]
    backend = Backend(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.add_special_tokens(specials)
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return backend


@pytest.fixture
def backend() -> Backend:
    """The library's own, as the oracle."""
    return word_piece()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Ours."""
    return Tokenizer(word_piece(), digest="sha256:words", special_tokens={"pad_token": "[PAD]"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact's canonical folder, as far as the tokenizer needs it."""
    word_piece().save(str(tmp_path / "tokenizer.json"))
    config = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ cls_token }}{{ messages[0].content }}{{ sep_token }}")
    return tmp_path
