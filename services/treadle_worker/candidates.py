"""The best tokens of a row in one defined order, without sorting the vocabulary.

The order is: the higher logit first, and the lower token id among equals. A cut holds a row's k first
tokens, but where logits tie with its last one it cannot tell which of them belong into it. So it also
says how many of its tokens are certain, and whoever needs more takes a longer cut. Whether a cut is long
enough depends on the row alone, and so does everything that is decided by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class Cut(NamedTuple):
    """The first k tokens of each of R rows."""

    token_ids: Int64Array
    """[R, k]"""
    logits: Float64Array
    """[R, k], falling."""
    num_certain: Int64Array
    """[R]: so many leading tokens are exactly the row's first ones; all that tie with them are included."""


def cut_sizes(vocab_size: int) -> Iterator[int]:
    """The lengths to try in turn; the last one holds everything."""
    yield from (size for size in (64, 1024) if size < vocab_size)
    yield vocab_size


def cut_best(logits_RV: torch.Tensor, k: int) -> Cut:
    """The k best tokens of each row; k = V sorts the row."""
    if k == logits_RV.shape[1]:
        logits, token_ids = torch.sort(logits_RV, dim=1, descending=True, stable=True)
        num_certain = np.full(len(logits_RV), k, np.int64)
        return Cut(token_ids.cpu().numpy(), logits.double().cpu().numpy(), num_certain)
    by_id = logits_RV.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    logits, order = torch.sort(logits_RV.gather(1, by_id), dim=1, descending=True, stable=True)
    num_certain = (logits > logits[:, -1:]).sum(dim=1).cpu().numpy()
    return Cut(by_id.gather(1, order).cpu().numpy(), logits.double().cpu().numpy(), num_certain)
