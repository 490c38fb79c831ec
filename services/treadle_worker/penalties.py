"""What a request's past and wishes do to its logits, before anything is drawn.

In the order of transformers' `_get_logits_processor`: logit bias, repetition penalty, then (not there)
frequency and presence penalties, and last the stop ids, which are out until `min_new_tokens`. Only the
logits that are concerned are read and written, so that a row's arithmetic is its own in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from treadle_worker.engine_protocol import SamplingParams


class TokenCounts(NamedTuple):
    """What the penalties read of a history, at one position."""

    token_ids: npt.NDArray[np.int64]
    output_counts: npt.NDArray[np.float32]


class TokenHistory:
    """The distinct tokens of a sequence, and how often its output has each. Appending is O(1)."""

    def __init__(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self._token_ids = np.fromiter(self._slots, np.int64, len(self._slots))
        self._output_counts = np.zeros(len(self._slots), np.float32)
        for token in output_token_ids:
            self.append(token)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """Each token of prompt and output once."""
        return self._token_ids[: len(self._slots)]

    @property
    def output_counts(self) -> npt.NDArray[np.float32]:
        """How often the output has each of token_ids."""
        return self._output_counts[: len(self._slots)]

    def counts_after(self, tokens: Sequence[int]) -> TokenCounts:
        """As it would be with these tokens appended to the output; the history stays as it is."""
        fresh = [token for token in dict.fromkeys(tokens) if token not in self._slots]
        slots = {token: slot for slot, token in enumerate(fresh, len(self._slots))}
        counts = np.concatenate([self.output_counts, np.zeros(len(fresh), np.float32)])
        for token in tokens:
            counts[slots[token] if token in slots else self._slots[token]] += 1
        return TokenCounts(np.concatenate([self.token_ids, np.array(fresh, np.int64)]), counts)

    def append(self, token: int) -> None:
        """Counts one more token of the output."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._token_ids):
            room = max(64, slot)
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room, np.int64)])
            self._output_counts = np.concatenate([self._output_counts, np.zeros(room, np.float32)])
        self._token_ids[slot] = token
        self._output_counts[slot] += 1


def has_penalties(params: SamplingParams) -> bool:
    """Whether the request's logits depend on its history."""
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


def add_logit_bias(logits_RV: torch.Tensor, biases: Sequence[tuple[int, dict[int, float]]]) -> None:
    """Adds to each named row its bias by token, in place."""
    if not biases:
        return
    row = np.concatenate([np.full(len(bias), index) for index, bias in biases])
    token = np.concatenate([np.fromiter(bias, np.int64, len(bias)) for _, bias in biases])
    value = np.concatenate([np.fromiter(bias.values(), np.float32, len(bias)) for _, bias in biases])
    where = _to(logits_RV, row), _to(logits_RV, token)
    logits_RV[where] = logits_RV[where] + _to(logits_RV, value)


def apply_penalties(
    logits_RV: torch.Tensor, penalties: Sequence[tuple[int, SamplingParams, TokenHistory | TokenCounts]]
) -> None:
    """Lowers the logits of tokens that were seen, in place, for each named row.

    Repetition as in CTRL (Keskar et al. 2019): logits of tokens of prompt and output are divided by the
    penalty where positive, and multiplied where negative. Frequency and presence as in OpenAI's API:
    logit -= count * frequency + (count > 0) * presence, with the count over the output alone.
    """
    if not penalties:
        return
    lengths = [len(history.token_ids) for _, _, history in penalties]

    def spread(values: Sequence[float], dtype: npt.DTypeLike) -> torch.Tensor:
        return _to(logits_RV, np.repeat(np.asarray(values, dtype), lengths))

    row = spread([index for index, _, _ in penalties], np.int64)
    token = _to(logits_RV, np.concatenate([history.token_ids for _, _, history in penalties]))
    count = _to(logits_RV, np.concatenate([history.output_counts for _, _, history in penalties]))
    repetition = spread([params.repetition_penalty for _, params, _ in penalties], np.float32)
    frequency = spread([params.frequency_penalty for _, params, _ in penalties], np.float32)
    presence = spread([params.presence_penalty for _, params, _ in penalties], np.float32)
    value = logits_RV[row, token]
    value = torch.where(value > 0, value / repetition, value * repetition)
    logits_RV[row, token] = value - count * frequency - (count > 0) * presence


def suppress_tokens(logits_RV: torch.Tensor, suppressed: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Gives the tokens of each named row no chance, in place."""
    if not suppressed:
        return
    row = np.concatenate([np.full(len(tokens), index) for index, tokens in suppressed])
    token = np.concatenate([np.asarray(tokens, np.int64) for _, tokens in suppressed])
    logits_RV[_to(logits_RV, row), _to(logits_RV, token)] = -torch.inf


def _to(like: torch.Tensor, values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)
