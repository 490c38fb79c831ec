"""Windows over a text's tokens, and what their log-probabilities say of a model. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from treadle.errors import invalid_field


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `[begin, start)` are context, `[start, end)` are scored."""

    begin: int
    start: int
    end: int


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Scores every token but the first once, with as much context as `window` tokens leave it.

    The first window scores all it has, each later one the next `stride` tokens after `window - stride` tokens
    of context, as in Transformers' guide to perplexity. Raises InvalidArgument.
    """
    if window < 2:
        raise invalid_field("window", f"must be at least 2 tokens; got {window}")
    if not 1 <= stride < window:
        raise invalid_field("stride", f"must be 1 to {window - 1}, less than the window; got {stride}")
    start, end = 1, min(window, num_tokens)
    while start < end:
        yield Window(max(0, end - window), start, end)
        start, end = end, min(end + stride, num_tokens)


def text_pieces(text: str, max_bytes: int) -> Iterator[str]:
    """The text in pieces of at most so many bytes of UTF-8, cut behind a line's end where there is one."""
    rest = text.encode()
    while len(rest) > max_bytes:
        cut = rest.rfind(b"\n", 0, max_bytes) + 1
        if cut == 0:
            cut = max_bytes
            while rest[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
        yield rest[:cut].decode()
        rest = rest[cut:]
    if rest:
        yield rest.decode()


@dataclass(frozen=True, slots=True)
class Surprise:
    """How surprised a model is by a text."""

    tokens: int
    """That were scored."""
    nll: float
    """Negative log-likelihood, natural, over all of them."""
    num_bytes: int
    """Of the scored tokens' text, in UTF-8."""

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens)"""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nll / ln 2 / bytes: comparable between models with different tokenizers."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else math.inf
