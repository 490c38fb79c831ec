"""A request as the engine sees it: its tokens, how far they are computed, and the blocks that hold them."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field

from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.scoring import Scoring
from treadle_worker.speculation import Drafting


class SequenceStatus(enum.Enum):
    """Where a sequence stands; PREEMPTED ones wait again, and are computed anew."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One request's tokens and their place in the KV cache.

    `token_ids` is the prompt and then the output, tokens that were delivered by an earlier owner
    included. The keys and values of the first `num_computed_tokens` are in the blocks of `block_table`.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    arrival: int
    """Rises with every request: the younger one has the higher number."""
    priority: int = 0
    cache_salt: str = ""
    max_num_tokens: int = sys.maxsize
    """Prompt and output at which it ends."""
    drafting: Drafting | None = None
    """What speculation knows of it; None: its tokens are not guessed."""
    scoring: Scoring | None = None
    """Of a text that is scored; None: tokens are drawn behind it."""
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache when it was first scheduled."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of its full blocks, as far as somebody asked for them; they outlive a preemption."""
    num_committed_blocks: int = 0
    """Leading blocks of block_table that the prefix cache was told of."""

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: higher priority, then earlier arrival. Unique."""
        return (-self.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output, delivered tokens included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step must still compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_cached_tokens(self) -> int:
        """Leading tokens that the cache may hold already: those before the first row of logits."""
        return len(self.token_ids) - 1 if self.scoring is None else self.scoring.first_row

    @property
    def is_finished(self) -> bool:
        """Whether it ended, for any reason."""
        return self.status is SequenceStatus.FINISHED
