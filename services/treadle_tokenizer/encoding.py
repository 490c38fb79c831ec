"""Texts to rows of ids: encoding, truncation and padding of one batch. Blocks; runs in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from treadle.errors import FailedPrecondition, invalid_field
from treadle.text.tokenizer import TextOrPair, Tokenizer
from treadle_tokenizer.windows import Truncation, windows

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Padding:
    """Rows are filled up to `length` (None: the longest of the batch), rounded up to `multiple_of`."""

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


@dataclass(slots=True)
class Row:
    """One encoded text or window. The lists beside `ids` are empty where they were not asked for."""

    input_index: int
    ids: list[int]
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """[start, end) in code points of the token's own text."""
    type_ids: list[int] = field(default_factory=list)
    attention_mask: list[int] = field(default_factory=list)


def encode(
    tokenizer: Tokenizer, texts: Sequence[TextOrPair], options: EncodeOptions, *, max_tokens: int
) -> list[Row]:
    """The rows in the order of the texts.

    Raises InvalidArgument where the rows would have more than `max_tokens` ids, and FailedPrecondition,
    reason NO_PADDING_TOKEN, where the tokenizer has none to pad with.
    """
    if options.truncation is None and not (options.offsets or options.type_ids):
        batch = tokenizer.encode_batch(texts, add_special_tokens=options.add_special_tokens)
        rows = [Row(index, ids) for index, ids in enumerate(batch)]
    else:
        rows = _whole_rows(tokenizer, texts, options, max_tokens)
    if (total := sum(len(row.ids) for row in rows)) > max_tokens:
        raise _too_many(total, max_tokens)
    if options.attention_mask:
        for row in rows:
            row.attention_mask = [1] * len(row.ids)
    if options.padding is not None:
        _pad(tokenizer, rows, options, options.padding, max_tokens)
    return rows


def _whole_rows(
    tokenizer: Tokenizer, texts: Sequence[TextOrPair], options: EncodeOptions, max_tokens: int
) -> list[Row]:
    rows: list[Row] = []
    total = 0
    batch = tokenizer.encode_whole(texts, add_special_tokens=options.add_special_tokens)
    for index, encoding in enumerate(batch):
        ids = encoding.ids
        offsets = encoding.offsets if options.offsets else []
        type_ids = encoding.type_ids if options.type_ids else []
        if options.truncation is None or len(ids) <= options.truncation.max_length:
            rows.append(Row(index, ids, offsets, type_ids))
            continue
        for kept in windows(encoding.sequence_ids, options.truncation):
            rows.append(
                Row(
                    index,
                    [ids[at] for at in kept],
                    [offsets[at] for at in kept] if offsets else [],
                    [type_ids[at] for at in kept] if type_ids else [],
                )
            )
            # A stride of nearly a window makes a window a token.
            total += len(kept)
            if total > max_tokens:
                raise _too_many(total, max_tokens)
    return rows


def _pad(
    tokenizer: Tokenizer, rows: Sequence[Row], options: EncodeOptions, padding: Padding, max_tokens: int
) -> None:
    if tokenizer.padding is None:
        raise FailedPrecondition(
            "the model's tokenizer has no padding token; leave padding out", reason="NO_PADDING_TOKEN"
        )
    length = padding.length or max((len(row.ids) for row in rows), default=0)
    length = -(-length // padding.multiple_of) * padding.multiple_of
    total = sum(max(length, len(row.ids)) for row in rows)
    if total > max_tokens:
        raise _too_many(total, max_tokens)
    for row in rows:
        missing = length - len(row.ids)
        if missing <= 0:
            continue
        row.ids = _fill(row.ids, tokenizer.padding.token_id, missing, padding.left)
        if options.offsets:
            row.offsets = _fill(row.offsets, (0, 0), missing, padding.left)
        if options.type_ids:
            row.type_ids = _fill(row.type_ids, tokenizer.padding.type_id, missing, padding.left)
        if options.attention_mask:
            row.attention_mask = _fill(row.attention_mask, 0, missing, padding.left)


def _fill(values: list[T], value: T, count: int, left: bool) -> list[T]:
    return [value] * count + values if left else values + [value] * count


def _too_many(total: int, max_tokens: int) -> Exception:
    return invalid_field(
        "inputs", f"make {total} tokens, padding included; at most {max_tokens} are answered; send fewer"
    )
