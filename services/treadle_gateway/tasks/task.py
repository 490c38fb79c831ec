"""The five tasks as a client asks for them, in plain Python; None is "not set"."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from treadle_gateway.generation import Priority, TokenPrompt


class Pooling(enum.IntEnum):
    """How the tokens' vectors become the text's; numbers as in the contract."""

    UNSPECIFIED = 0
    MEAN = 1
    CLS = 2
    LAST = 3


class Aggregation(enum.IntEnum):
    """What becomes of the tokens' labels; numbers as in the contract."""

    UNSPECIFIED = 0
    NONE = 1
    SIMPLE = 2
    FIRST = 3
    MAX = 4


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What every task says, unchecked."""

    request_id: str = ""
    tenant: str = ""
    model: str = ""
    profile: str = ""
    adapter: str = ""
    priority: int = Priority.UNSPECIFIED
    timeout_s: float | None = None
    payload_digest: str = ""
    """Of the task's kind and all that the client said but request_id and timeout."""


@dataclass(frozen=True, slots=True)
class TextInput:
    """A text, or a pair of them."""

    text: str
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class EmbedTask:
    """One vector a text."""

    name: ClassVar[str] = "embed"
    context: TaskContext = field(default_factory=TaskContext)
    inputs: tuple[TextInput, ...] = ()
    pooling: int = Pooling.UNSPECIFIED
    normalize: bool | None = None
    dimensions: int | None = None
    prompt_name: str = ""
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class ClassifyTask:
    """Labels of one or two sentences."""

    name: ClassVar[str] = "classify"
    context: TaskContext = field(default_factory=TaskContext)
    inputs: tuple[TextInput, ...] = ()
    multi_label: bool | None = None
    top_k: int | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class TagTask:
    """Labelled spans of texts."""

    name: ClassVar[str] = "tag"
    context: TaskContext = field(default_factory=TaskContext)
    inputs: tuple[TextInput, ...] = ()
    aggregation: int = Aggregation.UNSPECIFIED
    truncate: bool = False
    include_outside: bool = False


@dataclass(frozen=True, slots=True)
class RerankTask:
    """Documents by their relevance to a query."""

    name: ClassVar[str] = "rerank"
    context: TaskContext = field(default_factory=TaskContext)
    query: str = ""
    documents: tuple[str, ...] = ()
    top_n: int | None = None
    truncate: bool = False
    raw_scores: bool = False


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """A continuation and what it continues, each as text or as ids."""

    context: str = ""
    continuation: str = ""
    context_ids: TokenPrompt | None = None
    continuation_ids: TokenPrompt | None = None


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Log-probabilities of given texts."""

    name: ClassVar[str] = "score"
    context: TaskContext = field(default_factory=TaskContext)
    inputs: tuple[ScoreInput, ...] = ()


Task = EmbedTask | ClassifyTask | TagTask | RerankTask | ScoreTask
