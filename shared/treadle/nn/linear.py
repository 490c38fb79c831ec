"""Linear layers, norms and activations whose rows do not depend on how many rows there are.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT32_ROWS = 8
"""Float32 products take rows in multiples of this: the kernels round a shorter remainder otherwise."""


class Linear(nn.Module):
    """`x W^T + b`, each row with the same bits whatever the number of rows.

    bfloat16 products have that property by themselves; float32 ones once their rows are padded.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        rows = x_TI.shape[0]
        missing = -rows % FLOAT32_ROWS if x_TI.dtype is torch.float32 else 0
        if missing:
            x_TI = F.pad(x_TI, (0, 0, 0, missing))
        y_TO = F.linear(x_TI, self.weight, self.bias)
        return y_TO[:rows] if missing else y_TO


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., size]; the same dtype comes out."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """`x / (1 + exp(-x))`, computed in float32.

    torch's own silu takes another exponential for the elements at the end of a thread's share, and so
    rounds an element by where it stands; `exp`, `+` and `/` do not.
    """
    wide = x.float()
    return (wide / (1.0 + torch.exp(-wide))).to(x.dtype)
