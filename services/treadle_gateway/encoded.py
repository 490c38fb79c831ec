"""Texts as ids, and what can be asked of the tokenizer beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as ids, and the digest of the tokenizer that made them."""

    ids: tuple[int, ...]
    tokenizer_digest: str


Texts = Sequence[tuple[str, str | None]]
"""Single texts (their pair is None) and pairs."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Texts are cut on their right to so many tokens; of pairs the longer text, or the second one alone."""

    max_length: int
    second_only: bool = False


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """What beside ids is wanted, and how long texts may be."""

    cut: Cut | None = None
    add_special_tokens: bool = True
    type_ids: bool = False
    offsets: bool = False
    """With the words that the tokens are of."""
    special_tokens: bool = False
    """Which tokens the tokenizer added."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text or pair as ids; the others are empty where they were not wanted, and else one a token."""

    ids: Sequence[int]
    type_ids: Sequence[int] = ()
    starts: Sequence[int] = ()
    """In code points of the text."""
    ends: Sequence[int] = ()
    word_ids: Sequence[int] = ()
    """-1: of no word."""
    special: Sequence[int] = ()
    """1: added by the tokenizer."""


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Texts in their order, and the digest of the tokenizer that made their ids."""

    texts: Sequence[EncodedText]
    tokenizer_digest: str
