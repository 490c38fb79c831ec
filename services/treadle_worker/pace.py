"""How often the tokens of answers that have begun are written: at once for a few, together for many.

Each entry costs worker, Redis, gateway and client some time, whether it brings one token or three. So the
more answers stream at once, the longer their tokens gather, and all that streaming takes stays a small share
of the machine. A first token, an end, and whatever else changes hands is never kept waiting.
"""

from __future__ import annotations

PER_STREAM_S = 0.004
"""An entry costs about 0.15 ms in all: some 4% of one core, however many answers there are."""


class Pace:
    """When the gathered tokens of all answers are due; times are the event loop's, seconds."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s`: the longest that a token waits for the next turn; 0: it never does."""
        self._longest_s = longest_s
        self._turned_at = float("-inf")

    def wait_s(self, num_streams: int, now: float) -> float:
        """How long until the next turn, with so many answers that have tokens to write; 0: it is now."""
        return max(0.0, self._turned_at + min(self._longest_s, PER_STREAM_S * num_streams) - now)

    def turned(self, now: float) -> None:
        """All that had gathered is being written."""
        self._turned_at = now
