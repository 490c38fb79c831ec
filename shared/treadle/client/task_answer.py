"""What the tasks answer: vectors, labels, spans, an order, log-probabilities."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """What every answer says beside its result."""

    model_digest: str
    profile: str
    prompt_tokens: int
    """Tokens that were read, over all inputs."""


@dataclass(frozen=True, slots=True)
class Embeddings(TaskAnswer):
    """One vector a text, in their order. With numpy: `numpy.frombuffer(e.data, "<f4").reshape(e.shape)`."""

    data: bytes
    """float32, little-endian, row by row."""
    shape: tuple[int, int]
    """[texts, dimensions]"""

    @property
    def rows(self) -> list[array[float]]:
        """The vectors, each an `array("f")`."""
        numbers = array("f")
        numbers.frombytes(self.data)
        if sys.byteorder == "big":
            numbers.byteswap()
        count, width = self.shape
        return [numbers[row * width : (row + 1) * width] for row in range(count)]


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and its probability."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Classifications(TaskAnswer):
    """The labels of each text, best first."""

    labels: tuple[tuple[LabelScore, ...], ...]


@dataclass(frozen=True, slots=True)
class TaggedSpan:
    """A labelled part of a text: `text[start:end]`."""

    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class TaggedTexts(TaskAnswer):
    """The spans of each text."""

    spans: tuple[tuple[TaggedSpan, ...], ...]


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """`index` is the document's place in the request."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Ranking(TaskAnswer):
    """The documents, best first."""

    documents: tuple[RankedDocument, ...]


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """The log-probabilities of one continuation, natural, one a token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total_logprob: float
    greedy: bool
    """Whether each token was the most likely one."""


@dataclass(frozen=True, slots=True)
class Scores(TaskAnswer):
    """One score an input, in their order."""

    scores: tuple[ContinuationScore, ...]
