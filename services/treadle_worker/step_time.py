"""How long a step takes, learned from the steps before, and so how much prompt fits into one.

A step with prompts takes  base + per_token * tokens + per_key * keys  milliseconds: `base` is what a step
takes that only decodes (it reads all weights once, and attends for everybody who runs), `tokens` are the
prompts' tokens in it, `keys` the pairs of such a token and one that it attends to, which is why a chunk costs
more the further in its prompt it stands. All three are never negative, so the estimate rises with the work.

What is learned follows the machine and forgets: `base` is a running average, the other two are least
squares over steps that count less the longer ago they were. One step that took far longer than thought (the
machine was busy with something else) counts as twice what was thought: a few in a row are believed.
"""

from __future__ import annotations

import math

MIN_CHUNK = 16
"""Tokens of prompt that a step may hold whatever they take: a prompt always goes on."""
SURPRISE = 2.0
"""A step is never counted as longer than so many times what was expected."""
BASE_WEIGHT = 0.1
"""Of the newest step in the running average."""
CHUNK_WEIGHT = 0.05
"""By how much a chunk of FULL_CHUNK tokens or more makes the earlier ones count less."""
FULL_CHUNK = 64
_KEYS = 1024.0
"""Unit of keys a token, so that both sums of squares are of a size."""


def num_keys(start: int, num_tokens: int) -> int:
    """Pairs of a chunk's tokens and those that they attend to: each attends to all before it and itself."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


class StepTime:
    """The estimate. Milliseconds throughout."""

    def __init__(self) -> None:
        self.base = 0.0
        self.per_token = 0.0
        self.per_key = 0.0
        self._tt = self._tk = self._kk = self._ty = self._ky = 0.0

    @property
    def knows_prompts(self) -> bool:
        """Whether a step with prompt tokens was seen."""
        return self._tt > 0

    def expected(self, num_tokens: int, keys: int) -> float:
        """Of a step with so many prompt tokens and keys, and the decodes that there were lately."""
        return self.base + self.per_token * num_tokens + self.per_key * keys

    def observe(self, num_tokens: int, keys: int, took: float) -> None:
        """A step with these prompt tokens and keys took so long."""
        if num_tokens == 0:
            self.base += BASE_WEIGHT * (_believed(took, self.base) - self.base) if self.base else took
            return
        if self.knows_prompts:
            took = _believed(took, self.expected(num_tokens, keys))
        keep = 1 - CHUNK_WEIGHT * min(1.0, num_tokens / FULL_CHUNK)
        t, k, y = float(num_tokens), keys / _KEYS, max(0.0, took - self.base)
        self._tt, self._tk = keep * self._tt + t * t, keep * self._tk + t * k
        self._kk = keep * self._kk + k * k
        self._ty, self._ky = keep * self._ty + t * y, keep * self._ky + k * y
        self._solve()

    def _solve(self) -> None:
        """The least squares of both, or of one alone where the other would come out negative."""
        kk = self._kk * (1 + 1e-3)  # chunks that are all alike say nothing of keys
        determinant = self._tt * kk - self._tk * self._tk
        a = (self._ty * kk - self._ky * self._tk) / determinant
        b = (self._ky * self._tt - self._ty * self._tk) / determinant
        if b < 0:
            a, b = self._ty / self._tt, 0.0
        elif a < 0:
            a, b = 0.0, self._ky / kk
        self.per_token, self.per_key = a, b / _KEYS

    def num_tokens_within(self, budget: float, start: int) -> int:
        """How many prompt tokens from position `start` on take no more than `budget` beyond the base."""
        if budget <= 0:
            return 0
        linear, square = self.per_token + self.per_key * (start + 0.5), self.per_key / 2
        if linear + square <= 0:
            return 1 << 30
        # linear * n + square * n * n = budget, in the form that is exact for a small square
        root = math.sqrt(linear * linear + 4 * square * budget)
        return min(1 << 30, int(2 * budget / (linear + root)))


def _believed(took: float, expected: float) -> float:
    return min(took, SURPRISE * expected) if expected > 0 else took


class PrefillLimit:
    """How much prompt one step may still take, where others wait for their next token."""

    def __init__(self, step_time: StepTime, max_inter_token_ms: float) -> None:
        self._step_time = step_time
        self._left = max_inter_token_ms - step_time.base
        self._first = True

    @property
    def is_reached(self) -> bool:
        """Whether the step has its share: no further chunk of MIN_CHUNK tokens fits in."""
        return not self._first and self._step_time.num_tokens_within(self._left, 0) < MIN_CHUNK

    def num_tokens(self, start: int, wanted: int) -> int:
        """So many of the wanted tokens from `start` on may the step take; at least one."""
        least = MIN_CHUNK if self._first else 1
        fits = self._step_time.num_tokens_within(self._left, start) if self._step_time.knows_prompts else 0
        return min(wanted, max(least, fits))

    def take(self, start: int, num_tokens: int) -> None:
        """The step takes them."""
        self._first = False
        estimate, keys = self._step_time, num_keys(start, num_tokens)
        self._left -= estimate.per_token * num_tokens + estimate.per_key * keys
