"""All layers of a model as one native program: noted once, run at every step.

The model's own code is run on buffers, where every product and attention only notes what it would do. A
step then copies its tokens' embeddings into the first buffer and runs the program over as many rows as it
has: nothing of Python stands between two layers, and the interpreter's lock is free meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.nn.linear import RMSNorm
from treadle.nn.llama import LlamaForCausalLM
from treadle.nn.native import Buffer, Recorder
from treadle_worker.batch import ScheduledChunk
from treadle_worker.native_attention import NativeKVCache, NativeStep

FEWEST_ROWS = 64
"""Room that there is at least; it grows by doubling."""


class NativeProgram:
    """The layers of one model over one cache. Not for two threads at once."""

    def __init__(self, model: LlamaForCausalLM, cache: NativeKVCache) -> None:
        self._model, self._cache = model, cache
        self._record(FEWEST_ROWS)

    def _record(self, rows: int) -> None:
        import treadle_kernels as native

        self._recorder = Recorder(rows)
        self._hidden_RE = self._recorder.buffer(self._model.config.hidden_size)
        hidden: Tensor = self._hidden_RE
        for layer in self._model.model.layers:
            hidden = layer(hidden, self._attend)
        assert hidden is self._hidden_RE, "each layer adds to the stream in place"
        self._program = native.Program(self._recorder.calls)

    def _attend(self, layer: int, qkv_RX: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Buffer:
        out_RX = self._recorder.output(self._cache.width, "attention")
        self._recorder.calls.append(self._cache.call(layer, qkv_RX, q_norm, k_norm, out_RX))
        return out_RX

    def run(self, token_ids: Sequence[int], chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Hidden states [T, E] before the last norm; they hold until the next step."""
        step = NativeStep(chunks)
        if step.rows > self._recorder.rows:
            self._record(1 << (step.rows - 1).bit_length())
        hidden_TE = self._hidden_RE.as_subclass(Tensor)[: step.rows]
        hidden_TE.copy_(self._model.model.embed_tokens.weight[torch.tensor(token_ids)])
        self._program.run(step.rows, self._cache.threads, step.native)
        return hidden_TE
