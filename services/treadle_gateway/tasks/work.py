"""What a worker is asked to do for a task, complete; and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treadle_gateway.models import ServedModel


@dataclass(frozen=True, slots=True)
class WorkInput:
    """A text or pair as ids, with special tokens."""

    ids: Sequence[int]
    type_ids: Sequence[int] = ()
    """One a token; empty where all are 0."""
    first: int = 0
    """Embed: the first token that is pooled. Score: the continuation's first."""


@dataclass(frozen=True, slots=True)
class EmbedWork:
    """Vectors; `dimensions` 0 is all of them."""

    pooling: str
    normalize: bool
    dimensions: int = 0


@dataclass(frozen=True, slots=True)
class ClassifyWork:
    """Numbers of labels, through "softmax" or "sigmoid"."""

    activation: str


@dataclass(frozen=True, slots=True)
class TagWork:
    """The best label of each token."""


@dataclass(frozen=True, slots=True)
class RankWork:
    """Numbers of documents: by a head through "sigmoid" or "" (nothing), or by embeddings."""

    activation: str = ""
    embed: EmbedWork | None = None


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """Log-probabilities of continuations."""


Work = EmbedWork | ClassifyWork | TagWork | RankWork | ScoreWork


@dataclass(frozen=True, slots=True)
class Embeddings:
    """float32 [rows, dimensions], little-endian, as the worker wrote them."""

    rows: int
    dimensions: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Classifications:
    """For each input its labels with their numbers, best first."""

    rows: Sequence[Sequence[tuple[str, float]]]


@dataclass(frozen=True, slots=True)
class Span:
    """A labelled stretch of a text: code points [start, end)."""

    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class TaggedTexts:
    """For each input its spans, in their order."""

    rows: Sequence[Sequence[Span]]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents' indices with their numbers, best first."""

    documents: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """A continuation's natural log-probabilities, one a token."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    greedy: bool
    """Whether each token was the most likely one."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One for each input."""

    rows: Sequence[ContinuationScore]


Outcome = Embeddings | Classifications | TaggedTexts | Ranking | Scores


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a task, and how its result's bytes are read.

    `read` raises Internal (RESULT_MALFORMED) for bytes that are none of this work's.
    """

    inputs: Sequence[WorkInput]
    work: Work
    read: Callable[[bytes], Outcome]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan for one model."""

    model: ServedModel
    plan: Plan
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """A task's answer."""

    artifact_digest: str
    profile: str
    prompt_tokens: int
    outcome: Outcome
