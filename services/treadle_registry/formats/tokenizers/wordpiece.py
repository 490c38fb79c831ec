"""WordPiece from vocab.txt, as BERT and its kin have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from treadle_registry.formats.tokenizers.files import WORDPIECE, check_vocabulary, corrupt, read_lines
from treadle_registry.formats.tokenizers.special_tokens import SpecialTokens, flag, template

CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
DEFAULTS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def wordpiece(
    files: Mapping[str, Path], config: Mapping[str, Any], tokens: SpecialTokens
) -> tokenizers.Tokenizer:
    """The tokenizer; its id is a token's line, the last one where it has several.

    Raises InvalidArgument (CORRUPT_TOKENIZER).
    """
    vocabulary = {token: number for number, token in enumerate(read_lines(files[WORDPIECE]))}
    unknown = tokens.content("unk_token")
    if unknown not in vocabulary:
        raise corrupt(WORDPIECE, f"it lacks the unknown token {unknown!r}")
    made = models.WordPiece(vocab=check_vocabulary(WORDPIECE, vocabulary), unk_token=unknown)
    backend = tokenizers.Tokenizer(made)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=flag(config, "tokenize_chinese_chars", True),
        # Unset: as the lower case.
        strip_accents=None if config.get("strip_accents") is None else flag(config, "strip_accents", False),
        lowercase=flag(config, "do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    tokens.add_to(backend)
    first, between = tokens.content("cls_token"), tokens.content("sep_token")
    if first is None or between is None:
        raise corrupt("tokenizer_config.json", "cls_token or sep_token is null")
    single = [f"{first}:0", "$A:0", f"{between}:0"]
    backend.post_processor = template(backend, single, [*single, "$B:1", f"{between}:1"])
    return backend
