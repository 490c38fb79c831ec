"""What a client gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from treadle.errors import TreadleError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a chosen token, and the best ones at its place: token id to log-probability."""

    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step, or a few together, added to one choice."""

    choice: int
    index: int
    """The place in the choice's output of the first of `token_ids`."""
    token_ids: tuple[int, ...]
    text: str
    """May be empty, or longer than these tokens: characters are never split."""
    logprobs: tuple[TokenLogprobs, ...]
    cursor: str
    """Give it to `attach` to go on after this chunk."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt's facts, known before the first token."""

    request_id: str
    model_digest: str
    profile: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the prefix cache had."""
    seed: int
    tokenizer_digest: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and made; `output_tokens` counts all choices."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole output."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str
    """"stop_token", "stop_string" or "length"."""
    stop_string: str
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    prompt: Prompt
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first choice's tokens."""
        return self.choices[0].token_ids


@dataclass(frozen=True, slots=True)
class BatchItem(Generic[T]):
    """The outcome of one request of a batch or a stream: an answer or an error."""

    index: int
    """The request's place in the batch, from 0."""
    request_id: str
    """Empty: it could not be sent."""
    answer: T | None
    error: TreadleError | None

    def result(self) -> T:
        """The answer; raises the item's error."""
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be asked for now, or that no worker could load."""

    name: str
    """The alias, or the digest where it has none."""
    digest: str
    profile: str
    max_model_len: int
    """Prompt and answer together, in tokens."""
    vocab_size: int
    ready_workers: int
    error: str = ""
    """Where none is ready: why it could not be loaded."""
    tasks: tuple[str, ...] = ()
    """What can be asked of it: "generate", "score", "embed", "classify", "tag", "rerank"."""
    labels: tuple[str, ...] = ()
    """Of a model that classifies or tags."""
    embedding_dimensions: int = 0
    """Of a model that embeds."""
    prompt_names: tuple[str, ...] = ()
    """Of a model that embeds: the prompts that its folder defines."""
