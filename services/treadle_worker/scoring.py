"""What a scored sequence still needs, and what it has: how likely given tokens are, and which were likeliest.

The row of logits at a token's position says what comes next. So a text's last token is never computed, and of
the others only those from the one before the continuation on need their logits.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import numpy as np
import numpy.typing as npt

LOGITS_BYTES = 128 << 20
"""Of the rows that one step computes for scores: a text of thousands of tokens has a row for each."""
_LAYOUT = np.dtype([("best", "<u4"), ("logprob", "<f4")])
"""As queue.proto's ScoreWork lays it out."""


def max_score_rows(vocab_size: int) -> int:
    """Rows of logits, float32 over the vocabulary, that one step computes for scores."""
    return max(16, LOGITS_BYTES // (4 * vocab_size))


class Scoring:
    """One text's continuation. Rows come in order and stay, whatever becomes of the sequence's blocks."""

    __slots__ = ("_num_done", "_scores", "_targets", "first_row")

    def __init__(self, token_ids: ListOf[int], first: int) -> None:
        """`first` is the place of the continuation's first token, at least 1."""
        self.first_row = first - 1
        """The position whose row is needed next."""
        self._targets = np.array(token_ids[first:], np.int64)
        self._scores = np.zeros(len(self._targets), _LAYOUT)
        self._num_done = 0

    def num_rows(self, start: int, num_tokens: int) -> int:
        """How many of the rows of so many tokens from position `start` on are needed: their last ones."""
        return max(0, start + num_tokens - max(start, self.first_row))

    def num_tokens(self, start: int, wanted: int, max_rows: int) -> int:
        """How many of the wanted tokens from `start` on need no more than so many rows."""
        return min(wanted, max(0, self.first_row - start) + max_rows)

    def targets(self, num_rows: int) -> npt.NDArray[np.int64]:
        """The tokens whose log-probabilities the next rows say, int64 [rows]."""
        return self._targets[self._num_done : self._num_done + num_rows]

    def take(self, best_R: npt.NDArray[np.int64], logprobs_R: npt.NDArray[np.float32]) -> None:
        """Takes what the next rows say: the likeliest token, and the target's log-probability."""
        rows = self._scores[self._num_done : self._num_done + len(best_R)]
        rows["best"], rows["logprob"] = best_R, logprobs_R
        self._num_done += len(best_R)
        self.first_row += len(best_R)

    @property
    def result(self) -> bytes:
        """Of every token 8 bytes: the likeliest one's id, and the given one's log-probability."""
        return self._scores.tobytes()
