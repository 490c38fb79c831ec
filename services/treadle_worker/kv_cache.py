"""The paged key and value cache: tensors of blocks; which block is whose is the block manager's.

There are two: one for torch's operations on any device, and one in the order of the native kernels. A
cache starts a step, and the step attends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from treadle.models.config import ModelConfig
from treadle.nn.attention import Attention
from treadle.nn.execution import Kernels, uses_native
from treadle_worker.batch import ScheduledChunk
from treadle_worker.native_attention import NativeAttention, NativeKVCache
from treadle_worker.torch_attention import TorchAttention
from treadle_worker.torch_kv_cache import TorchKVCache

KVCache = NativeKVCache | TorchKVCache


def begin_step(cache: KVCache, chunks: Sequence[ScheduledChunk]) -> Attention:
    """The attention of one step, which writes the chunks' keys and values layer by layer."""
    if isinstance(cache, NativeKVCache):
        return NativeAttention(cache, chunks)
    return TorchAttention(cache, chunks)


class CachePlan:
    """What a cache is made of, known before there is one."""

    def __init__(
        self,
        config: ModelConfig,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kernels: Kernels = "auto",
    ) -> None:
        """`dtype` is the cache's own: torch.int8 has a scale for each token and head."""
        self.config, self.block_size, self.dtype, self.device = config, block_size, dtype, device
        self.is_native = _is_native(config, dtype, device, kernels)

    @property
    def bytes_per_block(self) -> int:
        """Over all layers, keys and values together, scales included."""
        config = self.config
        scale = 4 if self.dtype is torch.int8 else 0
        head = config.head_dim * self.dtype.itemsize + scale
        return 2 * config.num_hidden_layers * config.num_key_value_heads * self.block_size * head

    def build(self, num_blocks: int) -> KVCache:
        """The cache; raises MemoryError where there is no memory for it."""
        kind = NativeKVCache if self.is_native else TorchKVCache
        return kind(num_blocks, self.block_size, self.config, self.dtype, self.device)


def _is_native(config: ModelConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> bool:
    """The native kernels take heads in multiples of 16."""
    computed = torch.bfloat16 if dtype is torch.int8 else dtype
    return config.head_dim % 16 == 0 and uses_native(computed, device, kernels)
