"""What a client asks of a text: a vector, labels, spans, an order, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

Text = str | tuple[str, str]
"""A text, or a pair of sentences."""
Texts = str | Iterable[Text]
"""One text, or many; a pair alone is `[("first", "second")]`."""


class TaskOptions(TypedDict, total=False):
    """The keyword arguments that every task takes; see TaskRequest."""

    model: str
    request_id: str
    tenant: str
    profile: str
    priority: Literal["low", "normal", "high"]
    timeout_s: float | None


class EmbedOptions(TaskOptions, total=False):
    """The keyword arguments of `embed`; see EmbedRequest."""

    pooling: Literal["mean", "cls", "last"] | None
    normalize: bool | None
    dimensions: int | None
    prompt_name: str
    truncate: bool


class ClassifyOptions(TaskOptions, total=False):
    """The keyword arguments of `classify`; see ClassifyRequest."""

    multi_label: bool | None
    top_k: int | None
    truncate: bool


class TagOptions(TaskOptions, total=False):
    """The keyword arguments of `tag`; see TagRequest."""

    aggregation: Literal["none", "simple", "first", "max"] | None
    truncate: bool
    include_outside: bool


class RerankOptions(TaskOptions, total=False):
    """The keyword arguments of `rerank`; see RerankRequest."""

    top_n: int | None
    truncate: bool
    raw_scores: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """What every task carries."""

    model: str = ""
    """An alias or an artifact digest; empty: the client's model."""
    request_id: str = ""
    """Empty: the client makes one, so that a lost connection has nothing computed twice."""
    tenant: str = ""
    profile: str = ""
    priority: Literal["low", "normal", "high"] = "normal"
    timeout_s: float | None = None
    """Seconds for the whole request; None: the client's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest(TaskRequest):
    """One vector a text."""

    texts: Texts
    pooling: Literal["mean", "cls", "last"] | None = None
    """None: as the model's folder says."""
    normalize: bool | None = None
    """To length 1, after the cut to `dimensions`; None: as the model's folder says."""
    dimensions: int | None = None
    """Keep the first so many numbers of each vector."""
    prompt_name: str = ""
    """A prompt that the model's folder defines; empty: its default one."""
    truncate: bool = False
    """Cut a text that is too long; else it is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRequest(TaskRequest):
    """Labels with probabilities, for each text or pair."""

    texts: Texts
    multi_label: bool | None = None
    """Each label's probability by itself; None: as the model's folder says."""
    top_k: int | None = None
    """Only so many of the best labels."""
    truncate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TagRequest(TaskRequest):
    """Labelled spans of each text."""

    texts: Texts
    aggregation: Literal["none", "simple", "first", "max"] | None = None
    """How tokens become spans; None: "simple"."""
    truncate: bool = False
    include_outside: bool = False
    """Keep spans of the label "O", too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest(TaskRequest):
    """Documents ordered by their relevance to a query."""

    query: str
    documents: Sequence[str]
    top_n: int | None = None
    """Only so many of the best documents."""
    truncate: bool = False
    raw_scores: bool = False
    """The head's own number, instead of what the model's folder makes of it."""


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """A text whose log-probability is asked, and the one before it; either may be ids instead."""

    context: str | Sequence[int]
    """Empty: the token that the model's texts begin with."""
    continuation: str | Sequence[int]
    tokenizer_digest: str = ""
    """With ids: the tokenizer that made them."""


Scored = ScoreInput | tuple[str, str]
"""A ScoreInput, or (context, continuation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest(TaskRequest):
    """Log-probabilities of given texts."""

    inputs: Iterable[Scored]
