"""Attention over the CUDA cache: norms, turns and writes; a backend attends.

T: new tokens of the step; H, K: query and key heads; D: size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from treadle.nn.attention import heads_of
from treadle.nn.linear import RMSNorm
from treadle_worker.batch import ScheduledChunk, opened_blocks
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.step import HostRows, Places, RowBuffers, Staging, to_device

Attend = Callable[[int, Tensor], Tensor]
"""(layer, queries [T, H, D]) to [T, H, D]; the layer's keys and values of the step are written."""


class RowAttention(Protocol):
    """Attention of a graph's rows, each a token of its own with a table of its own."""

    def plan(self, rows: HostRows) -> None:
        """Before each replay, and outside of the graph: what must be known on the host."""
        ...

    def begin(self) -> Attend:
        """Within the graph: what is worked out once for all layers, from the buffers alone."""
        ...


class AttentionBackend(Protocol):
    """What reads the cache."""

    name: str
    gathers: bool
    """Whether it copies what it reads, as wide as the widest table: then graphs go by width, too."""

    def step(self, cache: CudaKVCache, chunks: Sequence[ScheduledChunk], staging: Staging) -> Planned:
        """A step of any chunks; adds what it needs on the device to `staging`."""
        ...

    def rows(self, cache: CudaKVCache, buffers: RowBuffers) -> RowAttention:
        """Rows whose tokens, positions and tables stand in the buffers, replay after replay."""
        ...


Planned = Callable[[Tensor], Attend]
"""Takes what `Staging.send` gave."""


class CudaAttention:
    """Attention of one step; see `treadle.nn.attention.Attention`."""

    def __init__(self, cache: CudaKVCache, positions_T: Tensor, slots_T: Tensor, attend: Attend) -> None:
        self._cache, self._slots_T, self._attend = cache, slots_T, attend
        cos, sin = cache.rotary.at(positions_T)
        self._cos_TD, self._sin_TD = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def __call__(self, layer: int, qkv_TX: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        """[T, H D]."""
        config = self._cache.config
        q_THD, k_TKD, v_TKD = heads_of(qkv_TX, config, self._turn, q_norm, k_norm)
        self._cache.write(layer, self._slots_T, k_TKD, v_TKD)
        mixed_THD = self._attend(layer, q_THD.to(self._cache.keys.dtype))
        return mixed_THD.flatten(1).to(qkv_TX.dtype)

    def _turn(self, x_THD: Tensor) -> Tensor:
        """`treadle.nn.rope.rotate`, in half as many launches."""
        halves = x_THD.roll(x_THD.shape[-1] // 2, -1)
        return torch.addcmul(x_THD * self._cos_TD, halves, self._sin_TD).to(x_THD.dtype)


def begin_cuda_step(cache: CudaKVCache, chunks: Sequence[ScheduledChunk]) -> CudaAttention:
    """A step of any chunks, launched operation by operation."""
    clear_opened(cache, chunks)
    staging, places = Staging(), Places.of(chunks, cache.block_size)
    positions, slots = staging.add(places.positions_T), staging.add(places.slots_T)
    planned = cache.backend.step(cache, chunks, staging)
    sent = staging.send(cache.keys.device)
    return CudaAttention(cache, sent[positions], sent[slots], planned(sent))


def clear_opened(cache: CudaKVCache, chunks: Sequence[ScheduledChunk]) -> None:
    """Empties the blocks that the step begins: most steps begin none."""
    if blocks := opened_blocks(chunks, cache.block_size):
        cache.clear(to_device(np.array(blocks, np.int64), cache.keys.device))
