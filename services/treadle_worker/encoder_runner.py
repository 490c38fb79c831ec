"""Computes one batch of texts with an encoder, and makes of it what each text's task asks for.

T: tokens of all texts, one after another; N: texts; E: hidden size; L: labels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from treadle.nn.encoder_model import EncoderBatch, EncoderModel
from treadle.nn.pooling import embed, pool
from treadle_worker.cuda.memory import release
from treadle_worker.encoder_engine import Result, TextWork

_Key = TypeVar("_Key", bound=Hashable)
_TAG = np.dtype([("label", "<u4"), ("probability", "<f4")])
"""As queue.proto's TagWork lays it out."""


class EncoderRunner:
    """One model; no text's numbers depend on the others of its batch."""

    def __init__(self, model: EncoderModel, device: torch.device) -> None:
        self.model: EncoderModel | None = model
        self.device = device
        self.num_rows = 0
        """Rows that the model was given so far: as many as the texts had tokens."""

    @torch.inference_mode()
    def run(self, works: Sequence[TextWork]) -> list[Result | None]:
        """See `encoder_engine.Runner`."""
        model = self.model
        assert model is not None, "nothing is run after close"
        lengths = tuple(len(work.text.token_ids) for work in works)
        batch = EncoderBatch(
            self._ids(work.text.token_ids for work in works),
            self._ids(work.text.type_ids or [0] * len(work.text.token_ids) for work in works),
            lengths,
        )
        self.num_rows += len(batch.token_ids_T)
        hidden_TE = model(batch)
        match model.config.head:
            case "token":
                return _tags(model.token_logits(hidden_TE), lengths)
            case "sequence":
                return _classes(model.sequence_logits(hidden_TE, lengths), works)
            case _:
                return _embeddings(hidden_TE, lengths, works)

    def _ids(self, ids: Iterator[Sequence[int]]) -> Tensor:
        return torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64).to(self.device)

    def close(self) -> None:
        """Gives back all memory; nothing is run after."""
        self.model = None
        release(self.device)


def _embeddings(
    hidden_TE: Tensor, lengths: tuple[int, ...], works: Sequence[TextWork]
) -> list[Result | None]:
    results: list[Result | None] = [None] * len(works)
    firsts = [work.text.first for work in works]
    for pooling, pooled in _groups([work.task.pooling for work in works]):
        assert pooling, "whoever pools says how"
        pooled_NE = pool(hidden_TE, lengths, firsts, pooling)
        asked = [(works[place].task.dimensions, works[place].task.normalize) for place in pooled]
        for (dimensions, normalize), members in _groups(asked):
            places = [pooled[member] for member in members]
            _put(results, places, embed(pooled_NE[places], dimensions, normalize))
    return results


def _classes(logits_NL: Tensor, works: Sequence[TextWork]) -> list[Result | None]:
    results: list[Result | None] = [None] * len(works)
    # A softmax or sigmoid makes sound numbers of infinite ones.
    sound_N = torch.isfinite(logits_NL).all(-1).tolist()
    for activation, places in _groups([work.task.activation for work in works]):
        values_nL = logits_NL[places]
        if activation:
            values_nL = values_nL.softmax(-1) if activation == "softmax" else _sigmoid(values_nL)
        _put(results, places, values_nL)
    return [result if is_sound else None for result, is_sound in zip(results, sound_N, strict=True)]


def _sigmoid(x: Tensor) -> Tensor:
    """torch's own rounds the last elements of a tensor in another way: a text's would depend on its place."""
    return 1.0 / (1.0 + torch.exp(-x))


def _tags(logits_TL: Tensor, lengths: tuple[int, ...]) -> list[Result | None]:
    best_T = logits_TL.softmax(-1).max(-1)
    tags_T = np.empty(len(logits_TL), _TAG)
    tags_T["label"] = best_T.indices.cpu().numpy()
    tags_T["probability"] = best_T.values.cpu().numpy()
    sound_T = torch.isfinite(logits_TL).all(-1).cpu().numpy()
    ends = np.cumsum(lengths)
    return [
        tags_T[end - length : end].copy() if sound_T[end - length : end].all() else None
        for length, end in zip(lengths, ends, strict=True)
    ]


def _put(results: list[Result | None], places: Sequence[int], values_nX: Tensor) -> None:
    """Puts each row into its place, unless it is not finite.

    A copy, since a task may wait for its other texts for long: a view would hold the rows of all.
    """
    sound_n = torch.isfinite(values_nX).all(-1).cpu().numpy()
    rows_nX = values_nX.cpu().numpy().astype("<f4", copy=False)
    for place, row, is_sound in zip(places, rows_nX, sound_n, strict=True):
        results[place] = row.copy() if is_sound else None


def _groups(keys: Sequence[_Key]) -> list[tuple[_Key, list[int]]]:
    """The places of each key, those of equal ones together."""
    found: dict[_Key, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return list(found.items())
