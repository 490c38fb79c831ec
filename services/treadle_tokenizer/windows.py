"""Truncation: which tokens of an encoded text or pair stay.

Done here and not by the library, which keeps the settings in the tokenizer, where concurrent requests would
see each other's. What stays is what Transformers keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from treadle.errors import InvalidArgument, invalid_field


class Strategy(Enum):
    """Which text of a pair is cut."""

    LONGEST_FIRST = "longest_first"
    """The longer one down to the shorter's length, then both alike."""
    ONLY_FIRST = "only_first"
    ONLY_SECOND = "only_second"


@dataclass(frozen=True, slots=True)
class Truncation:
    """At most `max_length` tokens, special ones included, cut on the right or the left.

    With `return_overflowing`, what was cut off follows in windows of the same length, which have `stride`
    tokens of the text in common; the other text of a pair is whole in each of them.
    """

    max_length: int
    left: bool = False
    stride: int = 0
    return_overflowing: bool = False
    strategy: Strategy = Strategy.LONGEST_FIRST


def windows(sequences: Sequence[int | None], truncation: Truncation, *, of: int) -> Iterable[list[int]]:
    """The positions of the tokens of each window, the first of them the truncated text itself.

    `sequences` says for each token which text it is from, 0 or 1, and None for a special token; `of` is the
    input's index, for errors. Raises InvalidArgument where special tokens, or the text that must stay
    whole, leave no room. Each window is made as it is asked for, since all of them may be far longer than
    the text.
    """
    positions = [[at for at, text in enumerate(sequences) if text == which] for which in (0, 1)]
    lengths = [len(positions[0]), len(positions[1])]
    num_special = len(sequences) - sum(lengths)
    room = truncation.max_length - num_special
    if sum(lengths) <= room:
        return [list(range(len(sequences)))]
    if room < 1:
        raise invalid_field(
            "truncation.max_length",
            f"must be more than the {num_special} special tokens; got {truncation.max_length}",
        )
    if truncation.strategy == Strategy.LONGEST_FIRST and lengths[1]:
        shares = _shares(lengths, room)
        kept = [_cut(positions[text], shares[text], truncation.left) for text in (0, 1)]
        return [_with_others(sequences, {*kept[0], *kept[1]})]
    cut = 1 if truncation.strategy == Strategy.ONLY_SECOND else 0
    room -= lengths[1 - cut]
    if room < 1 or not lengths[cut]:
        raise _too_short(truncation, of, lengths, cut)
    if not truncation.return_overflowing:
        kept_of_cut = _cut(positions[cut], room, truncation.left)
        return [_with_others(sequences, {*kept_of_cut, *positions[1 - cut]})]
    if truncation.stride >= room:
        raise invalid_field(
            "truncation.stride",
            f"must be less than the {room} tokens of the text in a window; got {truncation.stride}",
        )
    others = [at for at, text in enumerate(sequences) if text != cut]
    # Not from `sequences`: a window of three tokens must not take as long as the whole text.
    return (
        sorted([*others, *positions[cut][start:stop]])
        for start, stop in _spans(lengths[cut], room, truncation)
    )


def _spans(length: int, room: int, truncation: Truncation) -> Iterator[tuple[int, int]]:
    """[start, stop) of each window; the last one may be shorter."""
    for start in range(0, length, room - truncation.stride):
        stop = min(start + room, length)
        yield (length - stop, length - start) if truncation.left else (start, stop)
        if stop == length:
            break


def _shares(lengths: Sequence[int], room: int) -> tuple[int, int]:
    """How many tokens of each text of a pair stay: the shorter text is left whole as long as possible."""
    shorter = min(lengths)
    kept_of_shorter = min(shorter, room // 2)
    kept_of_longer = room - kept_of_shorter
    return (
        (kept_of_shorter, kept_of_longer) if lengths[0] <= lengths[1] else (kept_of_longer, kept_of_shorter)
    )


def _cut(positions: list[int], size: int, left: bool) -> list[int]:
    return positions[len(positions) - size :] if left else positions[:size]


def _with_others(sequences: Sequence[int | None], kept: set[int]) -> list[int]:
    return [at for at, text in enumerate(sequences) if text is None or at in kept]


def _too_short(truncation: Truncation, of: int, lengths: Sequence[int], cut: int) -> InvalidArgument:
    part = "second" if cut else "first"
    return invalid_field(
        f"inputs[{of}].{'pair' if cut else 'text'}",
        f"has {lengths[cut]} tokens, and the other text {lengths[1 - cut]}: cutting the {part} alone "
        f"({truncation.strategy.value}) leaves none of it in {truncation.max_length}; raise max_length, or "
        "choose another truncation.strategy",
    )
