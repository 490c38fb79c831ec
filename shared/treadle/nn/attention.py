"""The seam between the architectures and the cache: what a layer asks of attention.

T: new tokens of the step, of all sequences one after another; H: query heads; K: key and value heads;
D: size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from treadle.models.config import ModelConfig
from treadle.nn.linear import RMSNorm


class Attention(Protocol):
    """Attention of one step. It knows which token belongs to which sequence, and where the keys are."""

    def __call__(self, layer: int, qkv_TX: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        """Norms and turns queries and keys, adds keys and values to the cache, and attends: [T, H D].

        `qkv_TX` has a row's query heads, key heads and value heads, X = (H + 2 K) D. A token sees its own
        sequence up to itself, within the layer's window. Query head h reads key head h // (H / K); scores
        are scaled by D ** -0.5.
        """
        ...


def heads_of(
    qkv_TX: Tensor,
    config: ModelConfig,
    turn: Callable[[Tensor], Tensor],
    q_norm: RMSNorm | None,
    k_norm: RMSNorm | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, D] and keys [T, K, D], normed and turned, and values [T, K, D], in torch.

    `turn` rotates any heads [T, …, D] by their tokens' positions.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    heads_TXD = qkv_TX.unflatten(-1, (-1, config.head_dim))
    turned_TXD, v_TKD = heads_TXD[:, : heads + kv_heads], heads_TXD[:, heads + kv_heads :]
    if q_norm is not None and k_norm is not None:
        q_THD, k_TKD = turned_TXD.split((heads, kv_heads), 1)
        return turn(q_norm(q_THD)), turn(k_norm(k_TKD)), v_TKD
    q_THD, k_TKD = turn(turned_TXD).split((heads, kv_heads), 1)
    return q_THD, k_TKD, v_TKD
