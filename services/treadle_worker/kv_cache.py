"""The paged key and value cache: tensors of blocks; which block is whose is the block manager's.

There are three: one for torch's operations on any device, one in the order of the native kernels, and one in
that of CUDA's paged attention. A cache starts a step, and the step attends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from treadle.models.config import ModelConfig
from treadle.models.serving_memory import cache_block_bytes
from treadle.nn.attention import Attention
from treadle.nn.execution import Kernels, uses_native
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.attention import begin_cuda_step
from treadle_worker.cuda.backends import BackendName, choose_backend
from treadle_worker.cuda.kv_cache import RESERVED_BLOCKS, CudaKVCache
from treadle_worker.native_attention import NativeAttention, NativeKVCache
from treadle_worker.torch_attention import TorchAttention
from treadle_worker.torch_kv_cache import TorchKVCache

KVCache = NativeKVCache | TorchKVCache | CudaKVCache


def begin_step(cache: KVCache, chunks: Sequence[ScheduledChunk]) -> Attention:
    """The attention of one step, which writes the chunks' keys and values layer by layer."""
    if isinstance(cache, NativeKVCache):
        return NativeAttention(cache, chunks)
    if isinstance(cache, CudaKVCache):
        return begin_cuda_step(cache, chunks)
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
        attention_backend: BackendName = "auto",
    ) -> None:
        """`dtype` is the cache's own: torch.int8 has a scale for each token and head.

        Raises FailedPrecondition for kernels or a backend that cannot be had.
        """
        self.config, self.block_size, self.dtype, self.device = config, block_size, dtype, device
        self.backend = choose_backend(attention_backend, config, block_size, dtype, device)
        self.is_native = self.backend is None and _is_native(config, dtype, device, kernels)

    @property
    def attention(self) -> str:
        """What attends, by name."""
        if self.backend is not None:
            return self.backend.name
        return "native" if self.is_native else "torch"

    @property
    def num_reserved_blocks(self) -> int:
        """Blocks that the cache has beside those that are dealt out."""
        return 0 if self.backend is None else RESERVED_BLOCKS

    @property
    def bytes_per_block(self) -> int:
        """Over all layers, keys and values together, scales included."""
        return cache_block_bytes(self.config, self.block_size, str(self.dtype).removeprefix("torch."))

    def build(self, num_blocks: int) -> KVCache:
        """The cache; raises MemoryError where there is no memory for it."""
        if self.backend is not None:
            return CudaKVCache(
                num_blocks, self.block_size, self.config, self.dtype, self.device, self.backend
            )
        kind = NativeKVCache if self.is_native else TorchKVCache
        return kind(num_blocks, self.block_size, self.config, self.dtype, self.device)


def _is_native(config: ModelConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> bool:
    """The native kernels take heads in multiples of 16."""
    computed = torch.bfloat16 if dtype is torch.int8 else dtype
    return config.head_dim % 16 == 0 and uses_native(computed, device, kernels)
