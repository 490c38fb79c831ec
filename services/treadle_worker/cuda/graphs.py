"""CUDA graphs of small steps: a step's launches are recorded once for each size, then replayed at once.

A graph has a fixed number of rows, each one token with a block table of its own, and reads them from buffers
that never move. The tokens of a draft are rows that share a table: all keys of the step are written before
any are read, so a row sees those before it. A step takes the smallest graph that it fits; what is left of the
rows is padding, which touches none of the blocks that are dealt out. Other steps (prompts, more rows, keys
beyond the widest graph) run as they would without graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from treadle.nn.llama import LlamaForCausalLM
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.attention import CudaAttention, RowAttention, clear_opened
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.memory import drop_workspaces
from treadle_worker.cuda.sdpa import MAX_KEYS
from treadle_worker.cuda.step import HostRows, RowBuffers, num_blocks

SHORTEST_KEYS = 512
"""Keys of the narrowest graph, where graphs go by width."""

Replay = Callable[[], Tensor]
"""Computes anew from what the buffers hold now, into the same tensor each time."""


class Capture(Protocol):
    """Records what a function launches."""

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        """Runs it as often as needed before, too; its inputs must stay where they are."""
        ...


class CudaCapture:
    """With torch.cuda.CUDAGraph. The graphs share one pool of memory: no two run at once.

    So is cuBLAS's workspace taken from the pool, anew for each: it keeps one for every stream, which a graph
    would read long after somebody has let go of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        """See `Capture`; before, it runs on a stream of its own, for libraries to make what they keep."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                compute()
        current.wait_stream(self.stream)
        drop_workspaces(self.stream.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            out = compute()
        drop_workspaces(self.stream.device)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def row_buckets(largest: int) -> list[int]:
    """1, 2, 4, … and the largest."""
    return [1 << power for power in range((largest - 1).bit_length())] + [largest]


def width_buckets(num_blocks: int, block_size: int) -> list[int]:
    """Blocks of a table: enough for the shortest keys, then twice as many each, up to all."""
    width, widths = max(1, SHORTEST_KEYS // block_size), []
    while width < num_blocks:
        widths.append(width)
        width *= 2
    return [*widths, num_blocks]


@dataclass(frozen=True, slots=True)
class _Graph:
    buffers: RowBuffers
    attention: RowAttention
    replay: Replay


class DecodeGraphs:
    """The graphs of a model and its cache."""

    @torch.inference_mode()
    def __init__(
        self,
        model: LlamaForCausalLM,
        cache: CudaKVCache,
        capture: Capture,
        *,
        max_rows: int,
        max_chunk: int,
        max_model_len: int,
    ) -> None:
        """Captures them all, the largest first: the others find their memory in the pool.

        `max_rows`: tokens of the largest step; `max_chunk`: of one sequence, a draft and the token before it.
        """
        self._cache, self._max_chunk = cache, max_chunk
        widest = -(-max_model_len // cache.block_size)
        gathers = cache.backend.gathers
        widths = width_buckets(widest, cache.block_size) if gathers else [widest]
        sizes = [
            (rows, width)
            for rows in row_buckets(max_rows)
            for width in widths
            if not gathers or rows * width * cache.block_size <= MAX_KEYS
        ]
        self._graphs = {size: _record(model, cache, capture, *size) for size in sorted(sizes, reverse=True)}
        self._sizes = sorted(sizes)
        self.num_replays: Counter[tuple[int, int]] = Counter()
        """By rows and blocks of a table."""
        self.num_eager = 0
        """Steps that fitted no graph."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and blocks of a table of every graph, rising."""
        return list(self._sizes)

    def hidden(self, chunks: Sequence[ScheduledChunk]) -> Tensor | None:
        """The model's hidden states [T, E] by a graph, or None where none is for this step.

        They lie in the graph's own memory, and hold until the next step.
        """
        size = self._size(chunks)
        if size is None:
            self.num_eager += 1
            return None
        graph, rows = self._graphs[size], HostRows(*size, self._cache)
        rows.set(chunks)
        clear_opened(self._cache, chunks)
        graph.attention.plan(rows)
        graph.buffers.fill(rows)
        self.num_replays[size] += 1
        return graph.replay()[: sum(len(chunk.token_ids) for chunk in chunks)]

    def _size(self, chunks: Sequence[ScheduledChunk]) -> tuple[int, int] | None:
        lengths = [len(chunk.token_ids) for chunk in chunks]
        if max(lengths) > self._max_chunk:
            return None
        rows = sum(lengths)
        width = max(num_blocks(chunk, self._cache.block_size) for chunk in chunks)
        return next((size for size in self._sizes if size[0] >= rows and size[1] >= width), None)


def _record(
    model: LlamaForCausalLM, cache: CudaKVCache, capture: Capture, num_rows: int, width: int
) -> _Graph:
    """A graph, captured over rows that are all padding."""
    buffers = RowBuffers(num_rows, width, cache.keys.device)
    attention = cache.backend.rows(cache, buffers)
    padding = HostRows(num_rows, width, cache)
    attention.plan(padding)
    buffers.fill(padding)

    def compute() -> Tensor:
        attend = CudaAttention(cache, buffers.positions_R, buffers.slots_R, attention.begin())
        hidden_RE: Tensor = model(buffers.token_ids_R, attend)
        return hidden_RE

    return _Graph(buffers, attention, capture(compute))
