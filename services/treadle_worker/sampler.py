"""Draws the next token of every row at once.

Per row, in this order (transformers' `_get_logits_processor`): logit bias, penalties and suppressed stop
ids (penalties.py), then temperature, top-k, top-p, min-p, then one draw. Each filter keeps the beginning
of the row in falling order, so the draw is an inverse CDF over that order: with u = Philox(seed, position)
the first token is taken whose cumulative probability passes u times what the filters kept. It needs only
as much of the order as the draw reaches: a short cut in the common case, the whole row at worst, and the
answer is the same.

A row's token and log-probabilities are bitwise the same alone and in any batch: rows are only gathered
into groups, each operation works within its row, and which cut decides depends on the row alone.

Log-probabilities are the model's own: log softmax of the logits before bias, penalties and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from treadle_worker.candidates import Cut, Float64Array, Int64Array, cut_best, cut_sizes
from treadle_worker.engine_protocol import SamplingParams, TokenLogprobs
from treadle_worker.penalties import (
    TokenCounts,
    TokenHistory,
    add_logit_bias,
    apply_penalties,
    has_penalties,
    suppress_tokens,
)
from treadle_worker.philox import uniforms

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy: dividing by it would overflow."""


class SampleRow(NamedTuple):
    """What is drawn for one row of logits."""

    params: SamplingParams
    position: int
    """Index in the output of the token to draw; with the seed it fixes the draw."""
    history: TokenHistory | TokenCounts | None = None
    """Where the parameters have penalties."""


class Sample(NamedTuple):
    """One row's token."""

    token_id: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Turns logits into tokens. It keeps nothing from one step to the next."""

    @torch.inference_mode()
    def sample(self, logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sample | None]:
        """One sample a row, or None for a row with a logit that is not finite, or with no token left.

        `logits_RV` is float32 [rows, vocabulary], and is overwritten.
        """
        if not rows:
            return []
        low, high = torch.aminmax(logits_RV, dim=1)
        sound = torch.isfinite(low) & torch.isfinite(high)
        if not bool(sound.all()):
            logits_RV[~sound] = 0.0
        reported = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        raw_LV = torch.log_softmax(_take(logits_RV, reported), dim=1) if reported else None
        _adjust(logits_RV, rows)
        tokens = np.full(len(rows), -1, np.int64)
        greedy = [index for index, row in enumerate(rows) if row.params.temperature < GREEDY_BELOW]
        drawn = [index for index, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
        if greedy:
            tokens[greedy] = _best(_take(logits_RV, greedy))
        if drawn:
            tokens[drawn] = _draw(_take(logits_RV, drawn), [rows[index] for index in drawn])
        tokens[~sound.cpu().numpy()] = -1
        logprobs: dict[int, TokenLogprobs] = {}
        if raw_LV is not None:
            counts = [rows[index].params.logprobs or 0 for index in reported]
            logprobs = dict(zip(reported, _logprobs(raw_LV, tokens[reported], counts), strict=True))
        return [
            Sample(token, logprobs.get(index)) if token >= 0 else None
            for index, token in enumerate(tokens.tolist())
        ]


def _take(logits_RV: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]


def _adjust(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Bias, penalties and suppressed stop ids, in place."""
    add_logit_bias(
        logits_RV, [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
    )
    apply_penalties(
        logits_RV,
        [
            (i, row.params, row.history)
            for i, row in enumerate(rows)
            if row.history is not None and has_penalties(row.params)
        ],
    )
    suppress_tokens(
        logits_RV,
        [
            (i, row.params.stop_token_ids)
            for i, row in enumerate(rows)
            if row.position < row.params.min_new_tokens and row.params.stop_token_ids
        ],
    )


def _best(logits_RV: torch.Tensor) -> Int64Array:
    """The first best token of each row; -1 where none has a chance."""
    value, token = logits_RV.max(dim=1)
    best: Int64Array = torch.where(value > -torch.inf, token, -1).cpu().numpy()
    return best


def _draw(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> Int64Array:
    """One draw a row; -1 where no token has a chance."""
    filters = _Filters.of(rows, vocab_size=logits_RV.shape[1])
    u = uniforms(
        np.array([row.params.seed & 0xFFFFFFFFFFFFFFFF for row in rows], np.uint64),
        np.array([row.position for row in rows], np.uint64),
    )
    total = _total_weights(logits_RV, filters)
    tokens = np.full(len(rows), -1, np.int64)
    pending = np.arange(len(rows))
    for size in cut_sizes(logits_RV.shape[1]):
        whole = size == logits_RV.shape[1]
        now = pending if whole else pending[filters.top_k[pending] < size]
        if len(now) == 0:
            continue
        cut = cut_best(_take(logits_RV, now.tolist()), size)
        column = _decide(cut, filters.rows(now), total[now], u[now], whole=whole)
        decided = now[column >= 0]
        tokens[decided] = cut.token_ids[column >= 0, column[column >= 0]]
        pending = np.setdiff1d(pending, decided, assume_unique=True)
    return tokens


class _Filters(NamedTuple):
    """The rows' parameters as arrays [R]."""

    temperature: Float64Array
    top_k: Int64Array
    """0: off."""
    top_p: Float64Array
    min_p: Float64Array

    @classmethod
    def of(cls, rows: Sequence[SampleRow], vocab_size: int) -> _Filters:
        top_k = np.array([row.params.top_k for row in rows], np.int64)
        return cls(
            np.array([row.params.temperature for row in rows]),
            np.where(top_k < vocab_size, top_k, 0),
            np.array([row.params.top_p for row in rows]),
            np.array([row.params.min_p for row in rows]),
        )

    def rows(self, index: Int64Array) -> _Filters:
        return _Filters(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])


def _total_weights(logits_RV: torch.Tensor, filters: _Filters) -> Float64Array:
    """The sum over the vocabulary of exp((logit - best logit) / temperature), for rows without top-k.

    Taken from log_softmax, whose kernel goes row by row; a plain sum is split otherwise for one row
    than for many.
    """
    total = np.ones(len(logits_RV))
    rows = np.flatnonzero(filters.top_k == 0)
    if len(rows):
        x_RV = _take(logits_RV, rows.tolist())
        temperature = torch.from_numpy(filters.temperature[rows].astype(np.float32)).to(x_RV.device)
        x_RV = (x_RV - x_RV.amax(dim=1, keepdim=True)) / temperature[:, None]
        total[rows] = np.exp(-torch.log_softmax(x_RV, dim=1).amax(dim=1).double().cpu().numpy())
    return total


def _decide(cut: Cut, filters: _Filters, total: Float64Array, u: Float64Array, *, whole: bool) -> Int64Array:
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
    if whole:
        keep = np.minimum(keep, (weight > 0).sum(axis=1))
    filtered = has_k | has_p | has_m
    mass = np.where(filtered, cumulative[row, np.clip(keep, 1, k) - 1], total)
    column = np.minimum((cumulative <= (u * mass)[:, None]).sum(axis=1), keep - 1)
    settled = (filters.top_k <= certain) & np.where(filtered, keep <= certain, column < certain)
    return np.where(settled & (logits[:, 0] > -np.inf), column, -1)


def _logprobs(logprobs_LV: torch.Tensor, tokens: Int64Array, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of the chosen token (0 where there is none) and of the row's `counts` best ones."""
    chosen_id = torch.from_numpy(np.maximum(tokens, 0)).to(logprobs_LV.device)
    chosen = logprobs_LV.gather(1, chosen_id[:, None])[:, 0].tolist()
    wanted = np.minimum(np.asarray(counts, np.int64), logprobs_LV.shape[1])
    top: list[list[tuple[int, float]]] = [[] for _ in counts]
    pending: npt.NDArray[np.intp] = np.flatnonzero(wanted)
    for size in cut_sizes(logprobs_LV.shape[1]):
        if len(pending) == 0:
            break
        cut = cut_best(_take(logprobs_LV, pending.tolist()), size)
        settled = wanted[pending] <= cut.num_certain
        for place in np.flatnonzero(settled):
            index = pending[place]
            n = wanted[index]
            top[index] = list(
                zip(cut.token_ids[place, :n].tolist(), cut.logits[place, :n].tolist(), strict=True)
            )
        pending = pending[~settled]
    return [TokenLogprobs(logprob=value, top=best) for value, best in zip(chosen, top, strict=True)]
