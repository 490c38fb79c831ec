"""Which files make a tokenizer, by their names, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from treadle.errors import FailedPrecondition, InvalidArgument

WORDPIECE = "vocab.txt"
BYTE_LEVEL = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TEKKEN = "tekken.json"
MAX_VOCABULARY_BYTES = 64 << 20
"""Of one file; the largest known ones have 5 MB."""
MAX_TOKENS = 1 << 20
"""Of one vocabulary; the largest known ones have 260,000."""
MAX_TOKEN_CHARACTERS = 1024


_FORMS = (
    ("tokenizer.json",),
    *((name,) for name in SENTENCEPIECE),
    *BYTE_LEVEL,
    (WORDPIECE,),
)


def made_of(names: Collection[str]) -> tuple[str, ...]:
    """The files that the tokenizer is made of, tokenizer.json where there is one; nothing where none is."""
    return next((form for form in _FORMS if all(name in names for name in form)), ())


def check_there(names: Collection[str]) -> tuple[str, ...]:
    """As `made_of`; raises InvalidArgument (MISSING_FILE) where no tokenizer is there, and
    FailedPrecondition (UNSUPPORTED_TOKENIZER) where it is a Tekken file."""
    if form := made_of(names):
        return form
    if _TEKKEN in names:
        raise unsupported(
            f"the model has its tokenizer as {_TEKKEN}, Mistral's own format, which is not read"
        )
    for pair in BYTE_LEVEL:
        for here, other in (pair, pair[::-1]):
            if here in names:
                raise InvalidArgument(
                    f"the model has {here} without {other}; take both", reason="MISSING_FILE"
                )
    raise InvalidArgument(
        "the model has no tokenizer: tokenizer.json, or else "
        + ", ".join(" with ".join(form) for form in _FORMS[1:])
        + "; take the model's own",
        reason="MISSING_FILE",
    )


def corrupt(name: str, problem: str) -> InvalidArgument:
    """A file that is not what its name says."""
    return InvalidArgument(
        f"{name} cannot be read: {problem}; take the model's own file, or a tokenizer.json in its place",
        reason="CORRUPT_TOKENIZER",
    )


def unsupported(problem: str) -> FailedPrecondition:
    """A tokenizer that would come out wrong."""
    return FailedPrecondition(
        f"{problem}; take a tokenizer.json, or make one (in transformers: load and save_pretrained)",
        reason="UNSUPPORTED_TOKENIZER",
    )


def read_bytes(path: Path) -> bytes:
    """A vocabulary's file; raises InvalidArgument (CORRUPT_TOKENIZER)."""
    if (size := path.stat().st_size) > MAX_VOCABULARY_BYTES:
        raise corrupt(path.name, f"it has {size} bytes, and at most {MAX_VOCABULARY_BYTES} are read")
    return path.read_bytes()


def read_lines(path: Path) -> list[str]:
    """The lines of a text, without their ends; raises InvalidArgument (CORRUPT_TOKENIZER)."""
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise corrupt(path.name, f"byte {error.start} is no UTF-8") from error
    # Not splitlines(): a token may be one of the characters that it takes for an end.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    if len(lines) > MAX_TOKENS:
        raise corrupt(path.name, f"it has {len(lines)} lines, and at most {MAX_TOKENS} are read")
    return lines


def read_vocabulary(path: Path) -> dict[str, int]:
    """Tokens and their ids as JSON; raises InvalidArgument (CORRUPT_TOKENIZER)."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise corrupt(path.name, str(error)[:200]) from error
    if not isinstance(value, dict) or not value:
        raise corrupt(path.name, "it is no object of tokens and their ids")
    return check_vocabulary(path.name, value)


def check_vocabulary(name: str, vocabulary: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary, with ids below a bound, none of them twice, and tokens that are whole characters."""
    if len(vocabulary) > MAX_TOKENS:
        raise corrupt(name, f"it has {len(vocabulary)} tokens, and at most {MAX_TOKENS} are read")
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < 2 * MAX_TOKENS:
            raise corrupt(name, f"the id of {token[:40]!r} is {str(number)[:40]}")
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise corrupt(name, f"the token {number} has {len(token)} characters")
        if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
            raise corrupt(name, f"the token {number} has half a character")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise corrupt(name, "two tokens have the same id")
    return dict(vocabulary)
