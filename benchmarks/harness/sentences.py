"""Sentences of mixed length, cut out of a text at places drawn from a seed."""

from __future__ import annotations

import functools
import random
from pathlib import Path

SHORTEST, LONGEST = 3, 150
"""Words. The longest are shorter than what all-MiniLM cuts, so that all read the same."""


@functools.cache
def _words(text: Path) -> tuple[str, ...]:
    return tuple(text.read_text().split())


def sentences(text: Path, count: int, turn: int | str = 0) -> list[str]:
    """So many pieces; half of them have fewer words than the geometric middle of the two bounds."""
    words, drawn = _words(text), random.Random(f"{turn}/{count}")
    lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** drawn.random()) for _ in range(count)]
    starts = [drawn.randrange(len(words) - length) for length in lengths]
    return [" ".join(words[at : at + length]) for at, length in zip(starts, lengths, strict=True)]
