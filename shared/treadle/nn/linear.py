"""Linear layers, norms and activations whose rows do not depend on how many rows there are.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT32_ROWS = 8
"""Float32 products take rows in multiples of this: the kernels round a shorter remainder otherwise."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which weights of `dtype` are kept for products on `device`.

    A CPU without instructions for a half type multiplies it some ten times slower than float32. There
    the weights are widened once, which is exact, and the products accumulate in float32 as ever.
    """
    if device.type != "cpu" or dtype is torch.float32:
        return dtype
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if supported[dtype]() else torch.float32


class Linear(nn.Module):
    """`x W^T + b`, each row with the same bits whatever the number of rows.

    The weights have the dtype of x, or are float32; the result has the dtype of x. bfloat16 products have
    that property by themselves; float32 ones once their rows are padded.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        rows, dtype = x_TI.shape[0], x_TI.dtype
        x_TI = x_TI.to(self.weight.dtype)
        missing = -rows % FLOAT32_ROWS if x_TI.dtype is torch.float32 else 0
        if missing:
            x_TI = F.pad(x_TI, (0, 0, 0, missing))
        y_TO = F.linear(x_TI, self.weight, self.bias)
        return (y_TO[:rows] if missing else y_TO).to(dtype)


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
