"""The cache in the order of paged attention kernels: flash-attn and flashinfer read it as it is.

It lies on a CUDA device; on a CPU it is the same, for tests. B: block size; K: key heads; D: size of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treadle.models.config import ModelConfig
from treadle.nn.rope import RotaryEmbedding

if TYPE_CHECKING:
    from treadle_worker.cuda.attention import AttentionBackend

RESERVED_BLOCKS = 2


class CudaKVCache:
    """Keys and values of every layer, each [layers, blocks, B, K, D], and two blocks that nobody is given.

    `zero_block` is read where a table is shorter than its neighbours', and is never written;
    `scratch_block` is written by the rows that fill a batch up, and is never read.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        backend: AttentionBackend,
    ) -> None:
        """Raises MemoryError where the device has no room for it."""
        self.num_blocks, self.block_size, self.config, self.backend = num_blocks, block_size, config, backend
        self.zero_block, self.scratch_block = num_blocks, num_blocks + 1
        shape = (
            config.num_hidden_layers,
            num_blocks + RESERVED_BLOCKS,
            block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        try:
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"no memory for {num_blocks} blocks of cache on {device}: {error}") from error
        self.rotary = RotaryEmbedding(config, device)

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Puts each token's heads into its slot: block * B + place in the block."""
        for part, x_TKD in ((self.keys, k_TKD), (self.values, v_TKD)):
            part[layer].flatten(0, 1).index_copy_(0, slots_T, x_TKD.to(part.dtype))

    def gather(self, layer: int, tables_Sn: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tables of n blocks, as views [S, K, n B, D] of copies."""
        rows, width = tables_Sn.shape
        flat = tables_Sn.flatten()

        def of(part: Tensor) -> Tensor:
            blocks = part[layer].index_select(0, flat)  # [S n, B, K, D]
            return blocks.view(rows, width * self.block_size, *blocks.shape[2:]).transpose(1, 2)

        return of(self.keys), of(self.values)

    def clear(self, blocks: Tensor) -> None:
        """Empties blocks that get a new owner: a masked NaN of a failed request would still be one."""
        self.keys[:, blocks] = 0
        self.values[:, blocks] = 0
