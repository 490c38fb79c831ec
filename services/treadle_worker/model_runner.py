"""Runs the model over one step's chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treadle.nn.llama import LlamaForCausalLM
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.graphs import DecodeGraphs
from treadle_worker.cuda.memory import release, use
from treadle_worker.cuda.step import to_device
from treadle_worker.kv_cache import KVCache, begin_step
from treadle_worker.native_attention import NativeKVCache
from treadle_worker.native_program import NativeProgram


class ModelRunner:
    """A model and its cache. A step's tokens go through the layers as one flat batch."""

    def __init__(self, model: LlamaForCausalLM, cache: KVCache) -> None:
        self.model, self.cache, self.device = model, cache, cache.keys.device
        self.graphs: DecodeGraphs | None = None
        """Of small steps, on CUDA."""
        self._program: NativeProgram | None = None
        if model.is_native and isinstance(cache, NativeKVCache):
            self._program = NativeProgram(model, cache)

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Float32 logits [their `num_logits` together, vocabulary], in the chunks' order.

        Writes the keys and values of every token into the cache.
        """
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += len(chunk.token_ids)
            rows.extend(range(end - chunk.num_logits, end))
        hidden_TE = self._hidden(chunks)
        if len(rows) == end:
            return self.model.logits(hidden_TE)
        return self.model.logits(hidden_TE[to_device(np.array(rows, np.int64), self.device)])

    @torch.inference_mode()
    def prompt_logits(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Float32 logits [tokens, vocabulary] of every token of every chunk."""
        return self.model.logits(self._hidden(chunks))

    def _hidden(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        use(self.device)
        if self.graphs is not None and (replayed := self.graphs.hidden(chunks)) is not None:
            return replayed
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        if self._program is not None:
            return self._program.run(token_ids, chunks)
        token_ids_T = to_device(np.array(token_ids, np.int64), self.device)
        hidden_TE: Tensor = self.model(token_ids_T, begin_step(self.cache, chunks))
        return hidden_TE

    def close(self) -> None:
        """Lets go of the graphs, the cache and the model, and gives their memory back; runs nothing after."""
        self.graphs = self._program = None
        del self.cache, self.model
        release(self.device)
