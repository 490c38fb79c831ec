"""From the tokens' vectors to the text's: sentence-transformers' `Pooling` and `Normalize`, and matryoshka.

T: tokens of all texts, one after another; N: texts; E: hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["mean", "cls", "last"]


def pool(hidden_TE: Tensor, lengths: Sequence[int], firsts: Sequence[int], pooling: Pooling) -> Tensor:
    """One float32 vector a text, [N, E]: of the tokens from `firsts[i]` on (a prompt's own are before them).

    "mean" is their mean, "cls" the text's very first token whatever `firsts` says, "last" its last one, as in
    sentence-transformers. `lengths` sum up to T; the mean of no tokens is a vector of zeros.
    """
    device = hidden_TE.device
    lengths_N = torch.tensor(lengths, device=device)
    ends_N = lengths_N.cumsum(0)
    if pooling == "cls":
        return hidden_TE[ends_N - lengths_N].float()
    if pooling == "last":
        return hidden_TE[ends_N - 1].float()
    firsts_N = torch.tensor(firsts, device=device)
    # Each text's skipped tokens are a segment of their own before it: a segment is added up token by token,
    # so its sum does not depend on what stands beside it.
    segments_2N = torch.stack([firsts_N, lengths_N - firsts_N], dim=1).flatten()
    sums_2NE = torch.segment_reduce(hidden_TE.float(), "sum", lengths=segments_2N, axis=0, unsafe=True)
    return sums_2NE[1::2] / (lengths_N - firsts_N).clamp(min=1)[:, None]


def embed(pooled_NE: Tensor, dimensions: int, normalize: bool) -> Tensor:
    """The first `dimensions` (0: all) of each vector, brought to length 1 where `normalize` says so; a vector
    of zeros stays one."""
    if dimensions:
        pooled_NE = pooled_NE[:, :dimensions]
    return F.normalize(pooled_NE, dim=-1) if normalize else pooled_NE
