"""Attention by the package flash-attn (version 2), which reads the blocks where they lie.

Written to its documentation (`flash_attn_varlen_func` and `flash_attn_with_kvcache` with a block table).
Blocks must have a multiple of 256 tokens, heads at most 256 elements, keys and values a half type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from treadle.models.config import ModelConfig
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.attention import Attend, Planned
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.step import HostRows, RowBuffers, Staging, num_blocks

BLOCK_MULTIPLE = 256


class FlashAttnBackend:
    """See `AttentionBackend`. One call a layer for prompts' chunks and single tokens together."""

    name = "flash_attn"
    gathers = False

    def __init__(self) -> None:
        """Raises ImportError where the package is missing, or does not fit this torch."""
        import flash_attn

        self._varlen, self._with_kvcache = (
            flash_attn.flash_attn_varlen_func,
            flash_attn.flash_attn_with_kvcache,
        )

    @staticmethod
    def refuses(config: ModelConfig, block_size: int, dtype: torch.dtype) -> str:
        """Why it cannot read such a cache; empty where it can."""
        if block_size % BLOCK_MULTIPLE:
            return f"blocks must have a multiple of {BLOCK_MULTIPLE} tokens, not {block_size}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"keys and values must be float16 or bfloat16, not {dtype}"
        if config.head_dim > 256 or config.head_dim % 8:
            return f"heads must have at most 256 elements, a multiple of 8, not {config.head_dim}"
        return ""

    def step(self, cache: CudaKVCache, chunks: Sequence[ScheduledChunk], staging: Staging) -> Planned:
        """Queries stand one after another; a sequence's last query sees its last key."""
        queries = [len(chunk.token_ids) for chunk in chunks]
        keys = [chunk.start + len(chunk.token_ids) for chunk in chunks]
        held = [num_blocks(chunk, cache.block_size) for chunk in chunks]
        tables_Sn = np.full((len(chunks), max(held)), cache.zero_block, np.int64)
        for table_n, chunk, count in zip(tables_Sn, chunks, held, strict=True):
            table_n[:count] = chunk.block_table[:count]
        query_ends = staging.add(np.cumsum([0, *queries], dtype=np.int64))
        key_ends = staging.add(np.cumsum([0, *keys], dtype=np.int64))
        tables = staging.add(tables_Sn.ravel())
        most_queries, most_keys = max(queries), max(keys)

        def planned(sent: Tensor) -> Attend:
            ints = sent.int()
            table = ints[tables].view(tables_Sn.shape)

            def attend(layer: int, q_THD: Tensor) -> Tensor:
                mixed: Tensor = self._varlen(
                    q_THD,
                    cache.keys[layer],
                    cache.values[layer],
                    cu_seqlens_q=ints[query_ends],
                    cu_seqlens_k=ints[key_ends],
                    max_seqlen_q=most_queries,
                    max_seqlen_k=most_keys,
                    causal=True,
                    window_size=_window(cache, layer),
                    block_table=table,
                )
                return mixed

            return attend

        return planned

    def rows(self, cache: CudaKVCache, buffers: RowBuffers) -> FlashAttnRows:
        """Rows are sequences with one query."""
        return FlashAttnRows(cache, buffers, self._with_kvcache)


class FlashAttnRows:
    """See `RowAttention`."""

    def __init__(self, cache: CudaKVCache, buffers: RowBuffers, with_kvcache: Callable[..., Tensor]) -> None:
        self._cache, self._buffers, self._with_kvcache = cache, buffers, with_kvcache

    def plan(self, rows: HostRows) -> None:
        """Nothing: lengths and tables are read on the device."""

    def begin(self) -> Attend:
        """Tables and lengths as 32-bit integers."""
        cache, table = self._cache, self._buffers.tables_Rn.int()
        lengths = (self._buffers.positions_R + 1).int()

        def attend(layer: int, q_RHD: Tensor) -> Tensor:
            mixed: Tensor = self._with_kvcache(
                q_RHD.unsqueeze(1),
                cache.keys[layer],
                cache.values[layer],
                cache_seqlens=lengths,
                block_table=table,
                causal=True,
                window_size=_window(cache, layer),
            )
            return mixed.squeeze(1)

        return attend


def _window(cache: CudaKVCache, layer: int) -> tuple[int, int]:
    """Keys before and after a query's own that it sees; -1: all."""
    window = cache.config.window(layer)
    return (-1, -1) if window is None else (window - 1, 0)
