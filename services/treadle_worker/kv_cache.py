"""The paged key and value cache: tensors of blocks; which block is whose is the block manager's."""

from __future__ import annotations

import torch

from treadle.models.config import ModelConfig


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values together."""
    elements = config.num_hidden_layers * config.num_key_value_heads * block_size * config.head_dim
    return 2 * elements * dtype.itemsize


class KVCache:
    """Keys of every layer, each [blocks, K, D, block_size], and values, each [blocks, K, block_size, D].

    Heads stand before positions, and a key's dimensions before positions, so that a gathered block is the
    operand of a product as it is.
    """

    def __init__(
        self, num_blocks: int, block_size: int, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        heads = (config.num_hidden_layers, num_blocks, config.num_key_value_heads)
        self.keys = torch.zeros((*heads, config.head_dim, block_size), dtype=dtype, device=device)
        self.values = torch.zeros((*heads, block_size, config.head_dim), dtype=dtype, device=device)

    def clear(self, blocks: torch.Tensor) -> None:
        """Empties blocks that get a new owner.

        Attention reads a block whole and weighs what is not there with zero; zero times what a failed
        request may have left there, NaN, would be NaN.
        """
        self.keys[:, blocks] = 0
        self.values[:, blocks] = 0
