"""Byte-level BPE from its vocabulary and merges, as GPT-2, RoBERTa and Qwen2 have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from treadle_registry.formats.gguf_tokenizer import RULES
from treadle_registry.formats.tokenizers.files import (
    BYTE_LEVEL,
    MAX_TOKENS,
    corrupt,
    read_lines,
    read_vocabulary,
)
from treadle_registry.formats.tokenizers.special_tokens import SpecialTokens, enclosing, flag

_ROBERTA = ("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer")
_QWEN2 = ("Qwen2Tokenizer",)
CLASSES = ("GPT2Tokenizer", *_ROBERTA, *_QWEN2)
_END = "<|endoftext|>"


def defaults(kind: str) -> dict[str, str]:
    """The special tokens of a class."""
    if kind in _ROBERTA:
        ends = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        return ends | {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    if kind in _QWEN2:
        return {"unk_token": _END, "eos_token": _END, "pad_token": _END}
    return {"unk_token": _END, "bos_token": _END, "eos_token": _END}


def byte_level_bpe(
    files: Mapping[str, Path], config: Mapping[str, Any], tokens: SpecialTokens, kind: str
) -> tokenizers.Tokenizer:
    """The tokenizer of a class; raises InvalidArgument (CORRUPT_TOKENIZER)."""
    names = next(names for names in BYTE_LEVEL if all(name in files for name in names))
    vocabulary, merges = read_vocabulary(files[names[0]]), _merges(files[names[1]])
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:
        raise corrupt(names[1], f"its merges do not fit {names[0]} ({str(error)[:200]})") from error
    add_prefix_space = flag(config, "add_prefix_space", False)
    if kind in _QWEN2:
        backend.normalizer = normalizers.NFC()
        (pattern,) = RULES["qwen2"].patterns
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    tokens.add_to(backend)
    if kind in _ROBERTA:
        backend.post_processor = processors.RobertaProcessing(
            _with_id(backend, tokens.content("sep_token")),
            _with_id(backend, tokens.content("cls_token")),
            trim_offsets=flag(config, "trim_offsets", True),
            add_prefix_space=add_prefix_space,
        )
    else:
        before = tokens.content("bos_token") if flag(config, "add_bos_token", False) else None
        after = tokens.content("eos_token") if flag(config, "add_eos_token", False) else None
        backend.post_processor = enclosing(backend, before, after)
    return backend


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_lines(path), 1):
        # The first line may tell the format's version; a merge of "#" is none of its words.
        if line.startswith("#version") or not line.strip():
            continue
        parts = line.strip().split(" ")
        if len(parts) != 2 or not all(parts):
            raise corrupt(path.name, f"line {number} is not two tokens with a space between them")
        merges.append((parts[0], parts[1]))
    if len(merges) > MAX_TOKENS:
        raise corrupt(path.name, f"it has {len(merges)} merges, and at most {MAX_TOKENS} are read")
    return merges


def _with_id(backend: tokenizers.Tokenizer, token: str | None) -> tuple[str, int]:
    number = None if token is None else backend.token_to_id(token)
    if token is None or number is None:
        raise corrupt("the vocabulary", f"it lacks the special token {token!r}")
    return token, number
