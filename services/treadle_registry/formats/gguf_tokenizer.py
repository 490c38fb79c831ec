"""The byte-level BPE tokenizer of a GGUF file, rebuilt as a tokenizer.json.

How a text is cut before the merges is not in the file: it names a rule (`tokenizer.ggml.pre`) that
readers must know. The rules here give llama.cpp's ids; a rule that is not here is refused by its name,
since a nearly right one would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from treadle.errors import FailedPrecondition
from treadle_registry.formats.gguf_reader import GgufFile, corrupt

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS_PREFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a text is cut: `patterns` one after another, each isolating what it matches."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token as a whole stays one, whatever the merges say."""
    add_bos: bool = False
    """What a file that does not say means."""
    nfc: bool = False


_SMOLLM = _Rule((r"\p{N}", _GPT2))
_LLAMA3 = _Rule((_CASELESS_PREFIX + r"\p{N}{1,3}" + _LINES,), ignore_merges=True, add_bos=True)
# Qwen's own tokenizer composes characters first; llama.cpp leaves that out, and agrees on composed text.
_QWEN2 = _Rule((_CASELESS_PREFIX + r"\p{N}" + _LINES,), nfc=True)

RULES: Mapping[str, _Rule] = {
    "gpt-2": _Rule((_GPT2,)),
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


@dataclass(frozen=True, slots=True)
class RebuiltTokenizer:
    """tokenizer.json and tokenizer_config.json, and the chat templates by name ("default")."""

    tokenizer_json: str
    config: Mapping[str, Any]
    chat_templates: Mapping[str, str]


def tokenizer_from_gguf(file: GgufFile) -> RebuiltTokenizer:
    """Rebuilds the tokenizer; raises FailedPrecondition (UNSUPPORTED_TOKENIZER) or CORRUPT_GGUF."""
    rule = _rule(file)
    tokens, types, merges = _vocabulary(file)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise corrupt(file.path, "its vocabulary has a token twice")
    try:
        model = BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges)
    except Exception as error:
        raise corrupt(file.path, f"its merges do not fit its vocabulary ({error})") from error
    tokenizer = Tokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = {
        number: AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    }
    tokenizer.add_tokens(list(added.values()))
    named = _named_tokens(file, tokens)
    adds_bos = _flag(file, "add_bos_token", rule.add_bos) and "bos_token" in named
    adds_eos = _flag(file, "add_eos_token", False) and "eos_token" in named
    tokenizer.post_processor = _post_processor(named, vocabulary, adds_bos, adds_eos)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": False,
        **named,
    }
    return RebuiltTokenizer(tokenizer.to_str(), config, _chat_templates(file))


def _rule(file: GgufFile) -> _Rule:
    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre", "")
    if kind != "gpt2":
        raise FailedPrecondition(
            f"{file.path.name} has a tokenizer of the kind {kind!r}; byte-level BPE (gpt2) is rebuilt, for "
            "others import the Hugging Face folder, which has a tokenizer.json",
            reason="UNSUPPORTED_TOKENIZER",
        )
    if pre not in RULES:
        raise FailedPrecondition(
            f"{file.path.name} cuts text by the rule {pre!r}, which is not known here; known: "
            f"{', '.join(RULES)}. Import the Hugging Face folder, which has a tokenizer.json",
            reason="UNSUPPORTED_TOKENIZER",
        )
    return RULES[pre]


def _vocabulary(file: GgufFile) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    tokens, merges = _strings(file, "tokens"), _strings(file, "merges")
    types = file.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise corrupt(file.path, "tokenizer.ggml.token_type does not have one entry a token")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(tokens) > embedding.shape[0]:
        raise corrupt(file.path, f"it has {len(tokens)} tokens and {embedding.shape[0]} embeddings")
    pairs = []
    for merge in merges:
        # A token may begin with a space of its own, so the one that parts the two is looked for after it.
        at = merge.find(" ", 1)
        if at < 0:
            raise corrupt(file.path, f"the merge {merge[:40]!r} is not two tokens")
        pairs.append((merge[:at], merge[at + 1 :]))
    return tokens, types, pairs


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise corrupt(file.path, f"tokenizer.ggml.{key} is missing or is no list of strings")
    return value


def _named_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    named = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise corrupt(file.path, f"tokenizer.ggml.{key}_token_id is {number!r}, no token's id")
        named[f"{name}_token"] = tokens[number]
    return named


def _flag(file: GgufFile, key: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise corrupt(file.path, f"tokenizer.ggml.{key} must be true or false; got {value!r}")
    return value


def _post_processor(
    named: Mapping[str, str], vocabulary: Mapping[str, int], adds_bos: bool, adds_eos: bool
) -> processors.PostProcessor:
    before = [named["bos_token"]] if adds_bos else []
    after = [named["eos_token"]] if adds_eos else []
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not before and not after:
        return byte_level
    single = [*before, "$A:0", *after]
    pair = [*single, *before, "$B:1", *after]
    ids = [(token, vocabulary[token]) for token in {*before, *after}]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=sorted(ids))
    return processors.Sequence([byte_level, template])


def _chat_templates(file: GgufFile) -> dict[str, str]:
    templates = {}
    for key, value in file.metadata.items():
        if key == "tokenizer.chat_template" and isinstance(value, str):
            templates["default"] = value
        elif key.startswith("tokenizer.chat_template.") and isinstance(value, str):
            templates[key.removeprefix("tokenizer.chat_template.")] = value
    return templates
