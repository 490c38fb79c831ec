"""The special and added tokens of a model, as its folder tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from treadle_registry.formats.tokenizers.files import MAX_TOKEN_CHARACTERS, MAX_TOKENS, corrupt

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_FURTHER = ("additional_special_tokens", "extra_special_tokens")
ReadJson = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`named`: the tokens by name ("bos_token", …); `placed`: those whose id is told; `further`: others."""

    named: Mapping[str, AddedToken]
    placed: Mapping[int, AddedToken]
    further: tuple[AddedToken, ...] = ()

    def content(self, name: str) -> str | None:
        """A named token's text."""
        token = self.named.get(name)
        return None if token is None else token.content

    def contents(self) -> dict[str, str]:
        """All named tokens, for tokenizer_config.json."""
        return {name: token.content for name, token in self.named.items()}

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Adds them in the order of their ids, then those that have none.

        Raises InvalidArgument (CORRUPT_TOKENIZER) where a token would get another id than is told.
        """
        for number, token in sorted(self.placed.items()):
            backend.add_tokens([token])
            if (got := backend.token_to_id(token.content)) != number:
                raise corrupt(
                    "the list of added tokens",
                    f"{token.content[:40]!r} is {number} there and {got} in the model",
                )
        placed = {token.content for token in self.placed.values()}
        backend.add_tokens(
            [token for token in (*self.named.values(), *self.further) if token.content not in placed]
        )


def special_tokens(
    files: Mapping[str, Path], config: Mapping[str, Any], read: ReadJson, defaults: Mapping[str, str]
) -> SpecialTokens:
    """The tokens of tokenizer_config.json (`config`), special_tokens_map.json, added_tokens.json and, last,
    the `defaults` of the tokenizer's kind.

    Raises InvalidArgument (CORRUPT_TOKENIZER).
    """
    own = dict(config)
    if "special_tokens_map.json" in files:
        own = read(files["special_tokens_map.json"]) | own
    named = {
        name: _token(value, name, special=True)
        for name in NAMES
        if (value := own.get(name, defaults.get(name))) is not None
    }
    placed = _placed(own, files, read)
    for number, token in placed.items():
        if any(token.content == other.content for other in named.values()) and not token.special:
            placed[number] = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, special=True)
    further = []
    for key in _FURTHER:
        value = own.get(key) or []
        if not isinstance(value, list | dict) or len(value) > MAX_TOKENS:
            raise corrupt("tokenizer_config.json", f"{key} is no list of tokens")
        entries = value.values() if isinstance(value, dict) else value
        further += [_token(entry, key, special=True) for entry in entries]
    return SpecialTokens(named, placed, tuple(further))


def _placed(config: Mapping[str, Any], files: Mapping[str, Path], read: ReadJson) -> dict[int, AddedToken]:
    placed: dict[int, AddedToken] = {}
    if "added_tokens.json" in files:
        for content, number in read(files["added_tokens.json"]).items():
            placed[_number(number, "added_tokens.json")] = _token(content, "added_tokens.json", special=False)
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or len(listed) > MAX_TOKENS:
        raise corrupt("tokenizer_config.json", "added_tokens_decoder is no object")
    for number, value in listed.items():
        placed[_number(number, "added_tokens_decoder")] = _token(value, "added_tokens_decoder", special=False)
    return placed


def _number(value: object, where: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise corrupt(where, f"{text[:40]!r} is no token's id")
    return int(text)


def _token(value: object, where: str, *, special: bool) -> AddedToken:
    """A token that is written as a string, or as an object with the string as its content."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not 0 < len(content) <= MAX_TOKEN_CHARACTERS:
        raise corrupt("tokenizer_config.json", f"{where} has {str(content)[:40]!r}, which is no token")
    flags: dict[str, Any] = {"special": special, "normalized": not special}
    if isinstance(value, dict):
        flags |= {flag: value[flag] for flag in _FLAGS if isinstance(value.get(flag), bool)}
        flags["special"] |= special
    return AddedToken(content, **flags)


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A switch of tokenizer_config.json; raises InvalidArgument (CORRUPT_TOKENIZER)."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise corrupt("tokenizer_config.json", f"{name} must be true or false; it is {str(value)[:40]!r}")
    return value


def enclosing(
    backend: tokenizers.Tokenizer, before: str | None, after: str | None
) -> processors.TemplateProcessing:
    """Each text with a token before and one after it, where there are such; a pair's second is of type 1."""

    def around(text: str, kind: int) -> list[str]:
        tokens = [before, f"${text}", after]
        return [f"{token}:{kind}" for token in tokens if token is not None]

    return template(backend, around("A", 0), [*around("A", 0), *around("B", 1)])


def template(
    backend: tokenizers.Tokenizer, single: list[str], pair: list[str]
) -> processors.TemplateProcessing:
    """A template in the library's words: "$A:0" is the first text, "[SEP]:1" a token of type 1.

    Raises InvalidArgument (CORRUPT_TOKENIZER) where a token is not in the vocabulary.
    """
    used = sorted({part.rpartition(":")[0] for part in pair if not part.startswith("$")})
    ids = {token: backend.token_to_id(token) for token in used}
    if unknown := [token for token, number in ids.items() if number is None]:
        raise corrupt("the vocabulary", f"it lacks the special token {unknown[0][:40]!r}")
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))
