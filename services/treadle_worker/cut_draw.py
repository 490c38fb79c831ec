"""Draws from the best tokens of each row, on the device that has the logits: for those that are no CPU.

A cut holds the best tokens of a row in order (candidates.py). Most rows are decided by a short one; those
that are not are left to whoever looks at the whole row. A row's answer is the same either way, but for the
rounding of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from treadle_worker.candidates import Cut, Float64Array, Int64Array, cut_best, cut_sizes
from treadle_worker.engine_protocol import SamplingParams


def draw_by_cuts(logits_RV: torch.Tensor, params: Sequence[SamplingParams], u: Float64Array) -> Int64Array:
    """One draw a row; -1 where the cuts are too short to tell, or no token has a chance."""
    filters = Filters.of(params, vocab_size=logits_RV.shape[1])
    total = _total_weights(logits_RV, filters)
    tokens = np.full(len(params), -1, np.int64)
    pending = np.arange(len(params))
    for size in cut_sizes(logits_RV.shape[1]):
        now = pending[filters.top_k[pending] < size]
        if size == logits_RV.shape[1] or len(now) == 0:
            continue
        cut = cut_best(take(logits_RV, now.tolist()), size)
        column = _decide(cut, filters.rows(now), total[now], u[now])
        decided = now[column >= 0]
        tokens[decided] = cut.token_ids[column >= 0, column[column >= 0]]
        pending = np.setdiff1d(pending, decided, assume_unique=True)
    return tokens


def take(logits_RV: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows; a copy unless they are all."""
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]


class Filters(NamedTuple):
    """The rows' parameters as arrays [R]."""

    temperature: Float64Array
    top_k: Int64Array
    """0: off."""
    top_p: Float64Array
    min_p: Float64Array

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> Filters:
        """Of the rows."""
        top_k = np.array([each.top_k for each in params], np.int64)
        return cls(
            np.array([each.temperature for each in params]),
            np.where(top_k < vocab_size, top_k, 0),
            np.array([each.top_p for each in params]),
            np.array([each.min_p for each in params]),
        )

    def rows(self, index: Int64Array) -> Filters:
        """Of some of the rows."""
        return Filters(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])


def _total_weights(logits_RV: torch.Tensor, filters: Filters) -> Float64Array:
    """The sum over the vocabulary of exp((logit - best logit) / temperature), for rows without top-k.

    Taken from log_softmax, whose kernel goes row by row; a plain sum is split otherwise for one row
    than for many.
    """
    total = np.ones(len(logits_RV))
    rows = np.flatnonzero(filters.top_k == 0)
    if len(rows):
        x_RV = take(logits_RV, rows.tolist())
        temperature = torch.from_numpy(filters.temperature[rows].astype(np.float32)).to(x_RV.device)
        x_RV = (x_RV - x_RV.amax(dim=1, keepdim=True)) / temperature[:, None]
        total[rows] = np.exp(-torch.log_softmax(x_RV, dim=1).amax(dim=1).double().cpu().numpy())
    return total


def _decide(cut: Cut, filters: Filters, total: Float64Array, u: Float64Array) -> Int64Array:
    """The column of the cut that is drawn; -1 where the cut is too short to tell, or no token has a chance.

    A filter is decided by a cut if its boundary lies among the certain tokens. A filter that is not keeps
    all of those, so the decided ones settle the row. top-k keeps what ties with its last token, as
    transformers does; top-p keeps tokens until the mass before them reaches p.
    """
    logits, certain = cut.logits, cut.num_certain
    row, k = np.arange(len(logits)), logits.shape[1]
    with np.errstate(invalid="ignore"):  # a row of which nothing is left: -inf - -inf
        weight = np.exp((logits - logits[:, :1]) / filters.temperature[:, None])
    cumulative = np.cumsum(weight, axis=1)
    nothing = np.full(len(logits), k + 1)
    has_k, has_p, has_m = filters.top_k > 0, filters.top_p < 1, filters.min_p > 0
    kth = logits[row, np.minimum(filters.top_k, k) - 1]
    keep_k = np.where(has_k, (logits >= kth[:, None]).sum(axis=1), nothing)
    total = np.where(has_k, cumulative[row, np.minimum(keep_k, k) - 1], total)
    keep_p = np.where(has_p, (cumulative < (filters.top_p * total)[:, None]).sum(axis=1) + 1, nothing)
    keep_m = np.where(has_m, (weight >= filters.min_p[:, None]).sum(axis=1), nothing)
    keep = np.minimum(np.minimum(keep_k, keep_p), keep_m)
    filtered = has_k | has_p | has_m
    mass = np.where(filtered, cumulative[row, np.clip(keep, 1, k) - 1], total)
    column = np.minimum((cumulative <= (u * mass)[:, None]).sum(axis=1), keep - 1)
    settled = (filters.top_k <= certain) & np.where(filtered, keep <= certain, column < certain)
    return np.where(settled & (logits[:, 0] > -np.inf), column, -1)
