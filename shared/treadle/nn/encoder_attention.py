"""Attention inside each text of a flat batch: every token sees the whole of its own text and nothing else.

T: tokens of all texts; n: texts of one length; L: their length; H: heads; D: size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Texts of one length: those that stand one after another, or the rows `rows_R` of such as do not."""

    length: int
    texts: int
    start: int
    rows_R: Tensor | None = None


def runs_of(lengths: Sequence[int], device: torch.device) -> list[Run]:
    """The texts by length, so that each run is one call of attention without a mask.

    Where texts of one length do not stand together, their rows are gathered. What a text gets is the same
    either way.
    """
    starts: dict[int, list[int]] = {}
    start = 0
    for length in lengths:
        starts.setdefault(length, []).append(start)
        start += length
    runs = []
    for length, firsts in starts.items():
        if firsts[-1] - firsts[0] == length * (len(firsts) - 1):
            runs.append(Run(length, len(firsts), firsts[0]))
        else:
            rows = torch.tensor(firsts)[:, None] + torch.arange(length)
            runs.append(Run(length, len(firsts), firsts[0], rows.flatten().to(device)))
    return runs


class TextAttention(Protocol):
    """Attention inside the texts of one batch."""

    def __call__(self, qkv_TX: Tensor) -> Tensor:
        """[T, 3 H D], a row's queries, keys and values, to [T, H D]; scores are scaled by D ** -0.5."""
        ...


class TorchTextAttention:
    """A `TextAttention` in torch: one call for all texts of a length."""

    def __init__(self, lengths: Sequence[int], num_heads: int, device: torch.device) -> None:
        self._runs, self._num_heads = runs_of(lengths, device), num_heads

    def __call__(self, qkv_TX: Tensor) -> Tensor:
        """See `TextAttention`."""
        out_TE = qkv_TX.new_empty((qkv_TX.shape[0], qkv_TX.shape[1] // 3))
        for run in self._runs:
            tokens = slice(run.start, run.start + run.texts * run.length)
            qkv_RX = qkv_TX[tokens] if run.rows_R is None else qkv_TX.index_select(0, run.rows_R)
            qkv_nL3HD = qkv_RX.view(run.texts, run.length, 3, self._num_heads, -1)
            q_nHLD, k_nHLD, v_nHLD = qkv_nL3HD.permute(2, 0, 3, 1, 4)
            mixed_nHLD = F.scaled_dot_product_attention(q_nHLD, k_nHLD, v_nHLD)
            mixed_RE = mixed_nHLD.transpose(1, 2).reshape(-1, out_TE.shape[1])
            if run.rows_R is None:
                out_TE[tokens] = mixed_RE
            else:
                out_TE.index_copy_(0, run.rows_R, mixed_RE)
        if not out_TE.is_cuda:
            # Over fewer than 16 keys torch's own makes finite numbers of a query that is NaN, on the CPU.
            out_TE.add_(qkv_TX[:, : out_TE.shape[1]], alpha=0.0)
        return out_TE
