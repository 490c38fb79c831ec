"""Attention by the package flashinfer, which reads the blocks where they lie.

Written to its documentation: a wrapper is told of a step once (`plan`, on the host) and runs every layer.
A window is part of the plan, so there is a wrapper for each of the model's windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.models.config import ModelConfig
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.attention import Attend, Planned
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.step import HostRows, RowBuffers, Staging, num_blocks

WORKSPACE_BYTES = 128 << 20
"""What its documentation recommends."""
LAYOUT = "NHD"
"""Positions before heads within a block."""


class FlashInferBackend:
    """See `AttentionBackend`."""

    name = "flashinfer"
    gathers = False

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError where the package is missing, or does not fit this torch."""
        import flashinfer

        self._flashinfer = flashinfer
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[int | None, Any] = {}

    @staticmethod
    def refuses(config: ModelConfig, block_size: int, dtype: torch.dtype) -> str:
        """Why it cannot read such a cache; empty where it can."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"keys and values must be float16 or bfloat16, not {dtype}"
        if config.head_dim not in (64, 128, 256):
            return f"heads must have 64, 128 or 256 elements, not {config.head_dim}"
        return ""

    def step(self, cache: CudaKVCache, chunks: Sequence[ScheduledChunk], staging: Staging) -> Planned:
        """Its wrapper for prompts, which takes single tokens as well; brings its own numbers over."""
        queries = [len(chunk.token_ids) for chunk in chunks]
        last = [chunk.start + len(chunk.token_ids) - 1 for chunk in chunks]
        tables = [chunk.block_table[: num_blocks(chunk, cache.block_size)] for chunk in chunks]
        for window in dict.fromkeys(cache.config.sliding_windows):
            if window not in self._wrappers:
                self._wrappers[window] = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                    self._workspace, LAYOUT
                )
            self._wrappers[window].plan(
                _int32(np.cumsum([0, *queries])),
                *_pages(tables, last, cache.block_size),
                *_sizes(cache),
                causal=True,
                **_options(cache, window),
            )
        return lambda sent: _attend(cache, self._wrappers)

    def rows(self, cache: CudaKVCache, buffers: RowBuffers) -> FlashInferRows:
        """Its wrapper for decoding in graphs, of this number of rows."""
        num_rows, width = buffers.tables_Rn.shape
        device = buffers.flat.device

        def wrapper() -> Any:
            def ints(size: int) -> Tensor:
                return torch.zeros(size, dtype=torch.int32, device=device)

            return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                LAYOUT,
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=ints(num_rows + 1),
                paged_kv_indices_buffer=ints(num_rows * width),
                paged_kv_last_page_len_buffer=ints(num_rows),
            )

        return FlashInferRows(
            cache, {each: wrapper() for each in dict.fromkeys(cache.config.sliding_windows)}
        )


class FlashInferRows:
    """See `RowAttention`. A plan is written into the wrapper's own buffers, which the graph reads."""

    def __init__(self, cache: CudaKVCache, wrappers: dict[int | None, Any]) -> None:
        self._cache, self._wrappers = cache, wrappers

    def plan(self, rows: HostRows) -> None:
        """Tells every wrapper which blocks each row has."""
        cache, last = self._cache, rows.positions.tolist()
        tables = [
            table_n[: place // cache.block_size + 1].tolist()
            for table_n, place in zip(rows.tables, last, strict=True)
        ]
        pages = _pages(tables, last, cache.block_size)
        for window, wrapper in self._wrappers.items():
            wrapper.plan(*pages, *_sizes(cache), **_options(cache, window))

    def begin(self) -> Attend:
        """Nothing to work out."""
        return _attend(self._cache, self._wrappers)


def _attend(cache: CudaKVCache, wrappers: dict[int | None, Any]) -> Attend:
    def attend(layer: int, q_THD: Tensor) -> Tensor:
        wrapper = wrappers[cache.config.window(layer)]
        mixed: Tensor = wrapper.run(q_THD, (cache.keys[layer], cache.values[layer]))
        return mixed

    return attend


def _pages(
    tables: Sequence[Sequence[int]], last: Sequence[int], block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each table begins and ends, the tables, and how full each last block is."""
    return (
        _int32(np.cumsum([0, *map(len, tables)])),
        _int32(np.concatenate(tables)),
        _int32(np.asarray(last) % block_size + 1),
    )


def _sizes(cache: CudaKVCache) -> tuple[int, int, int, int]:
    config = cache.config
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim, cache.block_size


def _options(cache: CudaKVCache, window: int | None) -> dict[str, object]:
    return {
        "window_left": -1 if window is None else window - 1,
        "q_data_type": cache.keys.dtype,
        "kv_data_type": cache.keys.dtype,
    }


def _int32(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values).astype(np.int32))
