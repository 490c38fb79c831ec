"""Prompts of exact lengths, cut out of a text at places drawn from a seed: real words, as token ids.

Random ids would make a model babble in circles, which flatters whoever guesses tokens ahead.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

from harness import models
from harness.places import BENCHMARKS, DATA
from treadle.text.tokenizer import Tokenizer

_OWN = BENCHMARKS.parent / "tests" / "data" / "shakespeare.txt"
_LARGER = DATA / "wikitext2_valid.txt"


def default_text() -> Path:
    """WikiText-2 where it lies beside the checkout, else the text that the tests have."""
    return _LARGER if _LARGER.exists() else _OWN


@functools.cache
def text_tokens(text: Path) -> tuple[int, ...]:
    """A whole text's ids by the packaged model's tokenizer."""
    return tuple(Tokenizer.load(models.folder()).encode(text.read_text(), add_special_tokens=False))


def cut(turn: int | str, count: int, num_tokens: int, text: Path | None = None) -> list[list[int]]:
    """So many prompts of so many tokens: the same for every engine of a turn, others in every turn."""
    ids = text_tokens(text or default_text())
    places = random.Random(f"{turn}/{count}/{num_tokens}")
    starts = [places.randrange(len(ids) - num_tokens) for _ in range(count)]
    return [list(ids[start : start + num_tokens]) for start in starts]
