"""The seam between the architectures and the cache: what a layer asks of attention.

T: new tokens of the step, of all sequences one after another; H: query heads; K: key and value heads;
D: size of a head.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """Attention of one step. It knows which token belongs to which sequence, and where the keys are."""

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Adds the layer's new keys and values to the cache, and attends: [T, H, D].

        A token sees its own sequence up to itself, within the layer's window. Query head h reads key
        head h // (H / K); scores are scaled by D ** -0.5.
        """
        ...
