"""Texts to rows of ids: encoding, truncation and padding. Blocks; runs in threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from treadle.errors import FailedPrecondition, InvalidArgument, invalid_field
from treadle.text.tokenizer import TextOrPair, Tokenizer
from treadle_tokenizer.windows import Truncation, windows

T = TypeVar("T")
NONE = -1
"""The word and the text of a token that is of none."""
_MIN_WINDOW = 32
"""A window of fewer ids counts as so many: a row has its price, and there may be one a token."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Rows are filled up to `length` (None: the longest of the request), rounded up to `multiple_of`."""

    length: int | None = None
    multiple_of: int = 1
    left: bool = False


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """What an encode request asks for beside its texts."""

    add_special_tokens: bool = True
    truncation: Truncation | None = None
    padding: Padding | None = None
    offsets: bool = False
    type_ids: bool = False
    attention_mask: bool = False
    word_ids: bool = False
    sequence_ids: bool = False
    special_tokens_mask: bool = False

    @property
    def ids_alone(self) -> bool:
        """Whether nothing is asked for that only the library's whole records have."""
        asked = (self.offsets, self.type_ids, self.word_ids, self.sequence_ids, self.special_tokens_mask)
        return self.truncation is None and not any(asked)


@dataclass(slots=True)
class Row:
    """One encoded text or window. The lists beside `ids` are empty where they were not asked for."""

    input_index: int
    ids: list[int]
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """[start, end) in code points of the token's own text."""
    type_ids: list[int] = field(default_factory=list)
    attention_mask: list[int] = field(default_factory=list)
    word_ids: list[int] = field(default_factory=list)
    """The word of its text; `NONE` for special tokens and padding. So `sequence_ids`: the text, 0 or 1."""
    sequence_ids: list[int] = field(default_factory=list)
    special_tokens_mask: list[int] = field(default_factory=list)


class TokenBudget:
    """How many ids one request may become; shared by the threads that work on it."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._total = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Raises InvalidArgument where it is more than is left."""
        with self._lock:
            self._total += count
            total = self._total
        if total > self._max_tokens:
            raise _too_many(total, self._max_tokens)

    def check_padded(self, total: int) -> None:
        """Raises InvalidArgument where the rows, filled up, would be too many."""
        if total > self._max_tokens:
            raise _too_many(total, self._max_tokens)


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[TextOrPair],
    options: EncodeOptions,
    budget: TokenBudget,
    *,
    first: int = 0,
) -> list[Row]:
    """The rows in the order of the texts, not yet padded; `first` is the index of the first text.

    Raises InvalidArgument where the budget is spent, or nothing is left of a truncated text.
    """
    add = options.add_special_tokens
    if options.ids_alone:
        rows = []
        for index, ids in enumerate(tokenizer.encode_batch(texts, add_special_tokens=add), first):
            budget.take(len(ids))
            rows.append(Row(index, ids))
    else:
        rows = _whole_rows(tokenizer, texts, options, budget, first)
    if options.attention_mask:
        for row in rows:
            row.attention_mask = [1] * len(row.ids)
    return rows


def _whole_rows(
    tokenizer: Tokenizer, texts: Sequence[TextOrPair], options: EncodeOptions, budget: TokenBudget, first: int
) -> list[Row]:
    rows: list[Row] = []
    batch = tokenizer.encode_whole(texts, add_special_tokens=options.add_special_tokens)
    for index, encoding in enumerate(batch, first):
        count = len(encoding)
        truncation = options.truncation
        fits = truncation is None or count <= truncation.max_length
        if fits:
            # Before any list is made: offsets alone take a hundred bytes a token.
            budget.take(count)
        row = Row(
            index,
            encoding.ids,
            offsets=encoding.offsets if options.offsets else [],
            type_ids=encoding.type_ids if options.type_ids else [],
            word_ids=_numbers(encoding.word_ids) if options.word_ids else [],
            sequence_ids=_numbers(encoding.sequence_ids) if options.sequence_ids else [],
            special_tokens_mask=encoding.special_tokens_mask if options.special_tokens_mask else [],
        )
        if truncation is None or fits:
            rows.append(row)
            continue
        for kept in windows(encoding.sequence_ids, truncation, of=index):
            # A stride of nearly a window makes a window a token.
            budget.take(max(len(kept), _MIN_WINDOW) if truncation.return_overflowing else len(kept))
            rows.append(_window(row, kept))
    return rows


def _window(row: Row, kept: Sequence[int]) -> Row:
    def of(values: list[T]) -> list[T]:
        return [values[at] for at in kept] if values else []

    return Row(
        row.input_index,
        of(row.ids),
        offsets=of(row.offsets),
        type_ids=of(row.type_ids),
        word_ids=of(row.word_ids),
        sequence_ids=of(row.sequence_ids),
        special_tokens_mask=of(row.special_tokens_mask),
    )


def _numbers(values: Sequence[int | None]) -> list[int]:
    return [NONE if value is None else value for value in values]


def pad(tokenizer: Tokenizer, rows: Sequence[Row], options: EncodeOptions, budget: TokenBudget) -> None:
    """Fills the rows of a whole request up, where the options ask for it.

    Raises FailedPrecondition, reason NO_PADDING_TOKEN, where the tokenizer has none to pad with, and
    InvalidArgument where the budget is spent.
    """
    padding = options.padding
    if padding is None:
        return
    if tokenizer.padding is None:
        raise FailedPrecondition(
            "the model's tokenizer has no padding token; leave padding out", reason="NO_PADDING_TOKEN"
        )
    length = padding.length or max((len(row.ids) for row in rows), default=0)
    length = -(-length // padding.multiple_of) * padding.multiple_of
    budget.check_padded(sum(max(length, len(row.ids)) for row in rows))
    for row in rows:
        missing = length - len(row.ids)
        if missing <= 0:
            continue
        left = padding.left
        row.ids = _fill(row.ids, tokenizer.padding.token_id, missing, left)
        if options.offsets:
            row.offsets = _fill(row.offsets, (0, 0), missing, left)
        if options.type_ids:
            row.type_ids = _fill(row.type_ids, tokenizer.padding.type_id, missing, left)
        if options.attention_mask:
            row.attention_mask = _fill(row.attention_mask, 0, missing, left)
        if options.word_ids:
            row.word_ids = _fill(row.word_ids, NONE, missing, left)
        if options.sequence_ids:
            row.sequence_ids = _fill(row.sequence_ids, NONE, missing, left)
        if options.special_tokens_mask:
            row.special_tokens_mask = _fill(row.special_tokens_mask, 1, missing, left)


def _fill(values: list[T], value: T, count: int, left: bool) -> list[T]:
    return [value] * count + values if left else values + [value] * count


def _too_many(total: int, max_tokens: int) -> InvalidArgument:
    return invalid_field(
        "inputs",
        f"make {total} tokens, padding and windows included; at most {max_tokens} are answered; send fewer",
    )
