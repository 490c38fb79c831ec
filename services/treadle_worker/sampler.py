"""Draws the next token of every row at once.

Per row, in this order (transformers' `_get_logits_processor`): logit bias, penalties and suppressed stop
ids (penalties.py), then temperature, top-k, top-p, min-p, then one draw. Each filter keeps the beginning
of the row in falling order, so the draw is an inverse CDF over that order: with u = Philox(seed, position)
the first token is taken whose cumulative probability passes u times what the filters kept. It needs only
the part of the order in which the draw and the filters' limits fall (falling_order.py).

A row's token and log-probabilities are bitwise the same alone and in any batch: each operation works within
its row, and the draws of a CPU's logits are made row by row. (They are made with numpy, in one thread: a pass
over a row takes a few microseconds, less than waking up a second one.) Logits on another device are drawn
from there, as far as a row's best tokens decide (cut_draw.py); the rest is fetched.

Log-probabilities are the model's own: log softmax of the logits before bias, penalties and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from treadle_worker.candidates import Int64Array, cut_best, cut_sizes
from treadle_worker.cut_draw import draw_by_cuts, take
from treadle_worker.engine_protocol import SamplingParams, TokenLogprobs
from treadle_worker.falling_order import FallingOrder, Place, Scratch
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
    """Turns logits into tokens. It keeps nothing from one step to the next but room to work in."""

    def __init__(self) -> None:
        self._scratch = Scratch(0)

    @torch.inference_mode()
    def sample(self, logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sample | None]:
        """One sample a row, or None for a row with a logit that is not finite, or with no token left.

        `logits_RV` is float32 [rows, vocabulary], and is overwritten.
        """
        if not rows:
            return []
        best, sound = best_tokens(logits_RV)
        if not sound.all():
            logits_RV[torch.from_numpy(~sound).to(logits_RV.device)] = 0.0
        reported = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        raw_LV = torch.log_softmax(take(logits_RV, reported), dim=1) if reported else None
        if _adjust(logits_RV, rows):
            best, _ = best_tokens(logits_RV)
        tokens = best
        drawn = [index for index, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
        if drawn:
            tokens[drawn] = self._draw(
                take(logits_RV, drawn), [rows[index] for index in drawn], best[drawn] >= 0
            )
        tokens[~sound] = -1
        logprobs: dict[int, TokenLogprobs] = {}
        if raw_LV is not None:
            counts = [rows[index].params.logprobs or 0 for index in reported]
            logprobs = dict(zip(reported, _logprobs(raw_LV, tokens[reported], counts), strict=True))
        return [
            Sample(token, logprobs.get(index)) if token >= 0 else None
            for index, token in enumerate(tokens.tolist())
        ]

    def _draw(
        self, logits_RV: torch.Tensor, rows: Sequence[SampleRow], has_tokens: npt.NDArray[np.bool_]
    ) -> Int64Array:
        """One draw a row; -1 where no token has a chance."""
        u = uniforms(
            np.array([row.params.seed & 0xFFFFFFFFFFFFFFFF for row in rows], np.uint64),
            np.array([row.position for row in rows], np.uint64),
        )
        if logits_RV.device.type == "cpu":
            tokens = np.full(len(rows), -1, np.int64)
        else:
            tokens = draw_by_cuts(logits_RV, [row.params for row in rows], u)
        pending = np.flatnonzero((tokens < 0) & has_tokens)
        x_PV = take(logits_RV, pending.tolist()).cpu().numpy()
        if len(pending) and len(self._scratch.weight) != x_PV.shape[1]:
            self._scratch = Scratch(x_PV.shape[1])
        for x_V, index in zip(x_PV, pending.tolist(), strict=True):
            tokens[index] = draw_one(x_V, rows[index].params, float(u[index]), self._scratch)
        return tokens


def best_tokens(logits_RV: torch.Tensor) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """The first best token of each row, -1 where none has a chance; and whether all logits are finite."""
    if logits_RV.device.type == "cpu":
        x_RV = logits_RV.numpy()
        token = x_RV.argmax(axis=1)  # a NaN counts as the best
        high, low = x_RV[np.arange(len(x_RV)), token], x_RV.min(axis=1)
    else:
        value, index = logits_RV.max(dim=1)
        found_3R = torch.stack((value.double(), logits_RV.amin(dim=1).double(), index.double())).cpu().numpy()
        high, low, token = found_3R[0], found_3R[1], found_3R[2].astype(np.int64)
    best: Int64Array = np.where(high > -np.inf, token, -1)
    return best, np.isfinite(high) & np.isfinite(low)


def _adjust(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> bool:
    """Bias, penalties and suppressed stop ids, in place; whether there were any."""
    biases, penalties, suppressed = [], [], []
    for index, (params, position, history) in enumerate(rows):
        if params.logit_bias:
            biases.append((index, params.logit_bias))
        if history is not None and has_penalties(params):
            penalties.append((index, params, history))
        if position < params.min_new_tokens and params.stop_token_ids:
            suppressed.append((index, params.stop_token_ids))
    add_logit_bias(logits_RV, biases)
    apply_penalties(logits_RV, penalties)
    suppress_tokens(logits_RV, suppressed)
    return bool(biases or penalties or suppressed)


def draw_one(logits_V: npt.NDArray[np.float32], params: SamplingParams, u: float, scratch: Scratch) -> int:
    """The token that u draws from a row with at least one logit above -inf.

    top-k keeps what ties with its last token, as transformers does; top-p keeps tokens until the mass before
    them reaches p.
    """
    top_k = params.top_k if params.top_k < len(logits_V) else 0
    order = FallingOrder(logits_V, params.temperature, scratch, num_best=top_k)
    total, limits = order.total, list[Place]()
    if top_k and not order.is_rest(kth := order.at_count(top_k)):
        limits.append(order.last_equal(kth))
        total = order.mass_up_to(limits[0])
    if params.top_p < 1 and (limit := order.at_mass(params.top_p * total, inclusive=True)) is not None:
        limits.append(limit)
    if params.min_p > 0 and not order.is_rest(last := order.at_count(order.num_weighing(params.min_p))):
        limits.append(last)
    keep = min(limits, default=None)
    drawn = order.at_mass(u * (total if keep is None else order.mass_up_to(keep)), inclusive=False)
    if drawn is None:
        drawn = keep or order.at_mass(order.total, inclusive=True)
    assert drawn is not None, "the order's own weight is reached"
    return order.token(drawn if keep is None else min(drawn, keep))


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
        cut = cut_best(take(logprobs_LV, pending.tolist()), size)
        settled = wanted[pending] <= cut.num_certain
        for place in np.flatnonzero(settled):
            index = pending[place]
            n = wanted[index]
            top[index] = list(
                zip(cut.token_ids[place, :n].tolist(), cut.logits[place, :n].tolist(), strict=True)
            )
        pending = pending[~settled]
    return [TokenLogprobs(logprob=value, top=best) for value, best in zip(chosen, top, strict=True)]
