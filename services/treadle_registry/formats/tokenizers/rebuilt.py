"""The tokenizer of a folder: its tokenizer.json, or one rebuilt from the files that are there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from treadle.errors import TreadleError
from treadle_registry.formats.tokenizers import byte_level_bpe, sentencepiece, wordpiece
from treadle_registry.formats.tokenizers.files import (
    SENTENCEPIECE,
    WORDPIECE,
    check_there,
    corrupt,
    unsupported,
)
from treadle_registry.formats.tokenizers.sentencepiece_model import read_sentencepiece
from treadle_registry.formats.tokenizers.special_tokens import ReadJson, SpecialTokens, special_tokens

_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
"""Classes that say nothing."""
_CLASS_OF = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": sentencepiece.XLM_ROBERTA,
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "t5": sentencepiece.T5,
    "mt5": sentencepiece.T5,
    "albert": sentencepiece.ALBERT,
}
"""The tokenizer's class by config.json's model_type, where tokenizer_config.json names none."""
_PROBE = "Aé\u0301 ｱﬁ \u200b<s>\U0001f469\u200d\U0001f680 1,\t\n"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A tokenizer.json, and tokenizer_config.json with the special tokens by name."""

    tokenizer_json: bytes
    tokenizer: Mapping[str, Any]
    """`tokenizer_json`, decoded."""
    config: Mapping[str, Any]


def rebuild(
    files: Mapping[str, Path],
    tokenizer_config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    read: ReadJson,
) -> Rebuilt | None:
    """The tokenizer of a folder that has no tokenizer.json; None where it has one.

    `read` reads a JSON object. Raises InvalidArgument (MISSING_FILE, CORRUPT_TOKENIZER) and
    FailedPrecondition (UNSUPPORTED_TOKENIZER) for a class whose rules are not known here.
    """
    names = check_there(files)
    if names == ("tokenizer.json",):
        return None
    kind = _class(tokenizer_config, model_config)
    with _the_files_fault(names[0]):
        backend, tokens = _made(names, kind, files, tokenizer_config, read)
        # Rules that cannot be followed show at the first text.
        backend.decode(backend.encode(_PROBE, _PROBE).ids)
    config = {
        key: value
        for key, value in tokenizer_config.items()
        if key not in ("added_tokens_decoder", "tokenizer_file")
    }
    text = backend.to_str()
    return Rebuilt(text.encode(), json.loads(text), config | tokens.contents())


def _made(
    names: tuple[str, ...],
    kind: str,
    files: Mapping[str, Path],
    tokenizer_config: Mapping[str, Any],
    read: ReadJson,
) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    tokens: SpecialTokens
    if names[0] in SENTENCEPIECE:
        _check(kind or "LlamaTokenizer", sentencepiece.CLASSES, names[0])
        model = read_sentencepiece(files[names[0]])
        tokens = special_tokens(files, tokenizer_config, read, sentencepiece.defaults(model, kind))
        backend = sentencepiece.sentencepiece(model, names[0], tokenizer_config, tokens, kind)
    elif names == (WORDPIECE,):
        _check(kind or "BertTokenizer", wordpiece.CLASSES, WORDPIECE)
        tokens = special_tokens(files, tokenizer_config, read, wordpiece.DEFAULTS)
        backend = wordpiece.wordpiece(files, tokenizer_config, tokens)
    else:
        kind = kind or "GPT2Tokenizer"
        _check(kind, byte_level_bpe.CLASSES, " and ".join(names))
        tokens = special_tokens(files, tokenizer_config, read, byte_level_bpe.defaults(kind))
        backend = byte_level_bpe.byte_level_bpe(files, tokenizer_config, tokens, kind)
    return backend, tokens


def _class(tokenizer_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """The tokenizer's class, without the word for its quick form; "" where nothing tells."""
    named = tokenizer_config.get("tokenizer_class")
    kind = named.removesuffix("Fast") if isinstance(named, str) else ""
    if kind and kind not in _GENERIC:
        return kind
    model_type = model_config.get("model_type")
    return _CLASS_OF.get(model_type, "") if isinstance(model_type, str) else ""


def _check(kind: str, known: tuple[str, ...], name: str) -> None:
    if kind not in known:
        raise unsupported(
            f"the tokenizer is a {kind[:100]} from {name}, whose rules are not known here; known: "
            + ", ".join(known)
        )


@contextlib.contextmanager
def _the_files_fault(name: str) -> Iterator[None]:
    """What the library raises is said of the file: its panics, too, which are no Exceptions, where an added
    token or a text meets a rule that cannot be followed."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, TreadleError | OSError | KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise corrupt(name, f"it fails as it is made or tried ({str(error)[:200]})") from error
