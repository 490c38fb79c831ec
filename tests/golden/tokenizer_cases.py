"""The tokenizers that are held against Transformers: how each is made, and Transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizer_folders as folders
import transformers

from treadle.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Case:
    """A folder's maker, the class of Transformers that reads it, and the name of its SentencePiece model."""

    make: Callable[[Path], Path]
    oracle: type[Any]
    model: str = ""
    follows: str = ""
    """Where SentencePiece and Transformers disagree: "both" where they never do, else "transformers"."""
    better_in_windows: str = ""
    """What is not Transformers' in a text that was cut, since the library is wrong there: a field of Row."""


@dataclass(frozen=True)
class Pair:
    """Ours and Transformers', and SentencePiece's where there is one."""

    ours: Tokenizer
    oracle: Any
    processor: Any = None

    def special_texts(self) -> list[str]:
        """What SentencePiece would take for plain text."""
        return [token.content for token in self.oracle.added_tokens_decoder.values()]


def _roberta(folder: Path, **settings: Any) -> Path:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return folders.byte_level(folder, "RobertaTokenizer", "roberta", specials, **settings)


def _gpt2(folder: Path) -> Path:
    return folders.byte_level(folder, "GPT2Tokenizer", "gpt2", ["<|endoftext|>"], pad_token="<|endoftext|>")


def _gpt2_form(folder: Path) -> Path:
    """With the names that GPT-2's own files have."""
    _gpt2(folder)
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")
    return folder


def _qwen2(folder: Path) -> Path:
    return folders.byte_level(folder, "Qwen2Tokenizer", "qwen2", ["<|endoftext|>", "<|im_start|>"])


def _sentencepiece(name: str, kind: str, of_config: str, **settings: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir()
        folders.trained_sentencepiece(folder / name, **settings)
        return folders.write_config(folder, of_config, {"tokenizer_class": kind} if kind else {})

    return make


_T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
_ALBERT_IDS = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
_ALBERT_CONTROL = {"control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}
_BARE = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
_OWN = {"user_defined_symbols": ["<sep>", "king", "kingly"]}

CASES = {
    "WordPiece, MiniLM's tokenizer.json": Case(folders.minilm_json, transformers.BertTokenizer),
    "WordPiece, MiniLM's vocab.txt": Case(folders.minilm_vocabulary, transformers.BertTokenizer),
    "WordPiece, cased": Case(
        lambda folder: folders.minilm_vocabulary(folder, do_lower_case=False), transformers.BertTokenizer
    ),
    "byte-level BPE as GPT-2": Case(_gpt2, transformers.GPT2Tokenizer),
    "byte-level BPE as RoBERTa": Case(_roberta, transformers.RobertaTokenizer),
    "byte-level BPE as RoBERTa, prefixed": Case(
        lambda folder: _roberta(folder, add_prefix_space=True),
        transformers.RobertaTokenizer,
        # A token that comes first in its window keeps a space there that is trimmed everywhere else.
        better_in_windows="offsets",
    ),
    "byte-level BPE as Qwen2": Case(_qwen2, transformers.Qwen2Tokenizer),
    "SentencePiece BPE, Mistral v1": Case(
        folders.mistral_model, transformers.TokenizersBackend, "tokenizer.model", "both"
    ),
    "SentencePiece BPE, Mistral v3": Case(
        lambda folder: folders.mistral_model(folder, "mistral_instruct_tokenizer_240323.model.v3"),
        transformers.TokenizersBackend,
        "tokenizer.model",
        "both",
    ),
    "SentencePiece BPE, user-defined symbols": Case(
        _sentencepiece("tokenizer.model", "", "", model_type="bpe", **_BARE, **_OWN),
        transformers.TokenizersBackend,
        "tokenizer.model",
        "both",
    ),
    "Unigram by its file": Case(
        _sentencepiece("tokenizer.model", "", "", **_OWN),
        transformers.TokenizersBackend,
        "tokenizer.model",
        "transformers",
    ),
    "Unigram as T5": Case(
        _sentencepiece("spiece.model", "T5Tokenizer", "t5", **_T5_IDS),
        transformers.T5Tokenizer,
        "spiece.model",
        "transformers",
        # The template's 0 for the second text is only in the first window.
        better_in_windows="type_ids",
    ),
    "Unigram as XLM-RoBERTa": Case(
        _sentencepiece("sentencepiece.bpe.model", "XLMRobertaTokenizer", "xlm-roberta"),
        transformers.XLMRobertaTokenizer,
        better_in_windows="type_ids",
    ),
    "Unigram as ALBERT": Case(
        _sentencepiece("spiece.model", "AlbertTokenizer", "albert", **_ALBERT_IDS, **_ALBERT_CONTROL),
        transformers.AlbertTokenizer,
    ),
}


def open_pair(case: Case, tmp_path: Path) -> Pair:
    """Both tokenizers of a case, ours as an import and the service make it."""
    folder = case.make(tmp_path / "model")
    ours = Tokenizer.load(folders.canonical(folder, tmp_path / "canonical"))
    processor = None
    if case.model:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / case.model))
    oracle = case.oracle.from_pretrained(folder)
    # What a tokenizer.json bakes in belongs to a call.
    oracle._tokenizer.no_padding()
    oracle._tokenizer.no_truncation()
    return Pair(ours, oracle, processor)


def plain(texts: Sequence[str], pair: Pair) -> list[str]:
    """The texts that have none of the special tokens in them."""
    special = pair.special_texts()
    return [text for text in texts if not any(token in text for token in special)]
