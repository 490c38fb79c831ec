"""What one request still has to write: at most one entry on its way, the rest gathered behind it.

While Redis is slow or away tokens gather into one entry, so that a request holds no more than its answer.
An entry that is on its way keeps its id and its bytes until its fate is known: the retry of a write must be
the same write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from treadle_worker.engine_protocol import TokenLogprobs

StopReason = Literal["stop_token", "stop_string", "length"]


@dataclass(frozen=True, slots=True)
class Ending:
    """A good end of an answer."""

    reason: StopReason
    stop_string: str = ""
    stop_token_id: int | None = None


@dataclass(slots=True)
class TokenBatch:
    """Tokens that go into one entry."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], text: str, logprobs: Sequence[TokenLogprobs]) -> None:
        """Puts more tokens behind these."""
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        if text:
            self.texts.append(text)

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.texts)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An entry on its way."""

    number: int
    """Of the entry in its owner's epoch."""
    data: bytes
    is_terminal: bool
