"""The cache in the order of torch's operations, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.models.config import ModelConfig
from treadle.nn.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's blocks; int8 ones have a scale for each token and head."""

    keys: Tensor
    """[blocks, K, D, B]"""
    values: Tensor
    """[blocks, K, B, D]"""
    key_scales: Tensor | None
    """[blocks, K, B]"""
    value_scales: Tensor | None

    def write(self, blocks_T: Tensor, offsets_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Puts each token's heads into its place."""
        if self.key_scales is not None and self.value_scales is not None:
            k_TKD, self.key_scales[blocks_T, :, offsets_T] = _to_int8(k_TKD)
            v_TKD, self.value_scales[blocks_T, :, offsets_T] = _to_int8(v_TKD)
        self.keys[blocks_T, :, :, offsets_T] = k_TKD.to(self.keys.dtype)
        self.values[blocks_T, :, offsets_T] = v_TKD.to(self.values.dtype)

    def keys_of(self, blocks_n: Tensor) -> Tensor:
        """Float32 [n, K, D, B]."""
        keys = self.keys.index_select(0, blocks_n).float()
        return keys if self.key_scales is None else keys * self.key_scales[blocks_n].unsqueeze(2)

    def values_of(self, blocks_n: Tensor) -> Tensor:
        """Float32 [n, K, B, D]."""
        values = self.values.index_select(0, blocks_n).float()
        return values if self.value_scales is None else values * self.value_scales[blocks_n].unsqueeze(3)


def _to_int8(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """Integers, and the scales [T, K] that give them back."""
    wide = x_TKD.float()
    top_TK1 = wide.abs().amax(-1, keepdim=True)
    q_TKD = (wide * torch.where(top_TK1 > 0, 127.0 / top_TK1, 0.0)).round()
    return q_TKD, (top_TK1 / 127.0).squeeze(-1)


class TorchKVCache:
    """Keys of every layer, each [blocks, K, D, block_size], and values, each [blocks, K, block_size, D].

    Heads stand before positions, and a key's dimensions before positions, so that a gathered block is the
    operand of a product as it is.
    """

    def __init__(
        self, num_blocks: int, block_size: int, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size, self.config = num_blocks, block_size, config
        heads = (config.num_hidden_layers, num_blocks, config.num_key_value_heads)
        self.keys = torch.zeros((*heads, config.head_dim, block_size), dtype=dtype, device=device)
        self.values = torch.zeros((*heads, block_size, config.head_dim), dtype=dtype, device=device)
        scales = (*heads, block_size) if dtype is torch.int8 else (0,)
        self.key_scales = torch.zeros(scales, device=device)
        self.value_scales = torch.zeros(scales, device=device)
        self.rotary = RotaryEmbedding(config, device)

    def layer(self, layer: int) -> LayerCache:
        """One layer's part."""
        if self.keys.dtype is not torch.int8:
            return LayerCache(self.keys[layer], self.values[layer], None, None)
        return LayerCache(
            self.keys[layer], self.values[layer], self.key_scales[layer], self.value_scales[layer]
        )

    def clear(self, blocks: Tensor) -> None:
        """Empties blocks that get a new owner.

        Attention reads a block whole and weighs what is not there with zero; zero times what a failed
        request may have left there, NaN, would be NaN.
        """
        for part in (self.keys, self.values, self.key_scales, self.value_scales):
            if part.numel():
                part[:, blocks] = 0
