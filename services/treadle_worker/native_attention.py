"""Attention over a paged cache by the native kernels: one call a layer norms, turns, writes and attends.

A query's result has the same bits however the step is put together; see shared/kernels/src/attention.cpp,
which also has the order of keys and values within a block.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from treadle.models.config import ModelConfig
from treadle.nn.linear import RMSNorm
from treadle.nn.rope import RotaryEmbedding
from treadle_worker.batch import ScheduledChunk

if TYPE_CHECKING:
    import treadle_kernels


class NativeKVCache:
    """Keys and values of every layer, each [layers, blocks, K, block_size * D] in the kernels' own order.

    For int8 also a float32 scale for each token and head, [layers, blocks, K, block_size].
    """

    def __init__(
        self, num_blocks: int, block_size: int, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        import treadle_kernels as native

        self.num_blocks, self.block_size, self.config = num_blocks, block_size, config
        shape = (config.num_hidden_layers, num_blocks, config.num_key_value_heads, block_size)
        self.keys = _zeros((*shape[:-1], block_size * config.head_dim), dtype)
        self.values = _zeros(tuple(self.keys.shape), dtype)
        scaled = dtype is torch.int8
        self.key_scales = _zeros(shape if scaled else (0,), torch.float32)
        self.value_scales = _zeros(tuple(self.key_scales.shape), torch.float32)
        kinds = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.int8: "INT8"}
        kind = native.Kind[kinds[dtype]]
        layers = range(config.num_hidden_layers)
        self.caches = [native.Cache(kind, block_size, *self._addresses(layer, scaled)) for layer in layers]
        self.rotary = RotaryEmbedding(config, device)
        self.width = config.num_attention_heads * config.head_dim
        self.threads = torch.get_num_threads()

    def _addresses(self, layer: int, scaled: bool) -> list[int | None]:
        scales = [self.key_scales, self.value_scales] if scaled else []
        addresses: list[int | None] = [part[layer].data_ptr() for part in (self.keys, self.values, *scales)]
        return addresses + [None] * (4 - len(addresses))

    def call(
        self, layer: int, qkv_TX: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None, out_TX: Tensor
    ) -> treadle_kernels.Call:
        """A layer's attention, over contiguous float32 rows."""
        import treadle_kernels as native

        config, (cos, sin) = self.config, self.rotary.tables
        attention = native.AttentionCall(
            cache=self.caches[layer],
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qkv=qkv_TX.data_ptr(),
            q_norm=None if q_norm is None else q_norm.weight.data_ptr(),
            k_norm=None if k_norm is None else k_norm.weight.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            y=out_TX.data_ptr(),
            window=config.window(layer) or 0,
            epsilon=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
        )
        return native.Call(operation=native.Operation.ATTENTION, attention=attention)


_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
"""Shared memory, Python's default, has no large pages."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In large pages where the system has them: blocks lie scattered, and each is read from its beginning."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size, **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes of cache: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Written, not only promised: what is missing is missing now, not when a request comes.
    return torch.frombuffer(memory, dtype=dtype).view(shape).zero_()


class NativeStep:
    """One step's tokens as the kernels read them; keeps the arrays alive that it points at."""

    def __init__(self, chunks: Sequence[ScheduledChunk]) -> None:
        import treadle_kernels as native

        lengths = [len(chunk.token_ids) for chunk in chunks]
        tables = [chunk.block_table for chunk in chunks]
        rows = list(accumulate(lengths, initial=0))
        places = list(accumulate(map(len, tables), initial=0))
        row_of = np.array(rows, np.int32)
        start_of = np.array([chunk.start for chunk in chunks], np.int32)
        positions = np.arange(rows[-1], dtype=np.int32) + np.repeat(start_of - row_of[:-1], lengths)
        blocks = np.fromiter(chain.from_iterable(tables), np.int32, places[-1])
        self.rows = rows[-1]
        self._arrays = (row_of, start_of, np.array(places[:-1], np.int64), blocks, positions)
        self.native = native.Step(self.rows, len(chunks), *(array.ctypes.data for array in self._arrays))


class NativeAttention:
    """Attention of one step; see `treadle.nn.attention.Attention`."""

    def __init__(self, cache: NativeKVCache, chunks: Sequence[ScheduledChunk]) -> None:
        self._cache, self._step = cache, NativeStep(chunks)

    def __call__(self, layer: int, qkv_TX: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        """[T, H D], float32."""
        import treadle_kernels as native

        qkv_TX = qkv_TX.float().contiguous()
        out_TX = qkv_TX.new_empty((self._step.rows, self._cache.width))
        call = self._cache.call(layer, qkv_TX, q_norm, k_norm, out_TX)
        native.Program([call]).run(self._step.rows, self._cache.threads, self._step.native)
        return out_TX
