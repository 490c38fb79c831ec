"""Linear layers, norms and activations whose rows do not depend on how many rows there are.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT32_ROWS = 8
"""Float32 products take rows in multiples of this: the kernels round a shorter remainder otherwise."""
HALF_ROWS = 4
"""Products of half types take at least so many rows: fewer go to kernels that add in another order. With
AVX512-BF16 four rows cost what one does."""
_HALF_STEPS = ((64, 8), (256, 32))
"""Up to so many rows they go in multiples of so many; beyond, of 256. oneDNN keeps a kernel and its memory,
some 0.6 MB, for each number of rows that a layer has seen."""


class Kernel(Protocol):
    """A product with weights of its own; see `Linear.forward`."""

    def __call__(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor:
        """[T, I], or [T, 2 I] where gated, to [T, O]; may put the result into `residual`."""
        ...


class Linear(nn.Module):
    """`x W^T + b`, each row with the same bits whatever the number of rows.

    Accumulated in float32; the result has the dtype of x. Products have the property once their rows are
    padded. `prepare` or `use` chooses the kernel, by profile and machine, never by the batch.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: _PackedHalf | None = None
        self._kernel: Kernel | None = None

    def prepare(self) -> None:
        """Once the weights are there: packs or widens them where the CPU has no products of their dtype.

        torch's own fallback for a half type is some ten times slower than float32.
        """
        if _has_products(self.weight):
            return
        if "fbgemm" in torch.backends.quantized.supported_engines:
            self._packed = _PackedHalf(self.weight, self.bias)
        else:
            self.float()

    def use(self, kernel: Kernel) -> None:
        """Multiplies with this from now on, and lets go of the weights: the kernel has its own."""
        self._kernel = kernel
        self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype), requires_grad=False)

    @property
    def comes_in_sizes(self) -> bool:
        """Whether its products are half types' on a CPU that has such."""
        return (
            self._packed is None
            and self._kernel is None
            and self.weight.device.type == "cpu"
            and self.weight.dtype is not torch.float32
        )

    def forward(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[T, I] to [T, O]: the product of `norm(x)`, plus `residual`, whose memory may become the result's.

        `gated`: x is [T, 2 I], gates and values, and the product of `silu(gates) * values` is taken.
        """
        if self._kernel is not None:
            return self._kernel(x, norm, gated, residual)
        x_TI = prologued(x, norm, gated)
        if residual is not None and x_TI.is_cuda and self.bias is None:
            return torch.addmm(residual, x_TI, self.weight.t())
        y_TO = self._product(x_TI)
        return y_TO if residual is None else residual + y_TO

    def _product(self, x_TI: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed(x_TI)
        rows, dtype = x_TI.shape[0], x_TI.dtype
        x_TI = x_TI.to(self.weight.dtype)
        if x_TI.dtype is torch.float32:
            x_TI = pad_rows(x_TI, FLOAT32_ROWS)
        elif self.comes_in_sizes:
            x_TI = pad_rows(x_TI, _half_multiple(rows))
        return F.linear(x_TI, self.weight, self.bias)[:rows].to(dtype)


class _PackedHalf:
    """FBGEMM's float16 weights with float32 rows, for x86 CPUs without products of half types.

    The weights are scaled by a power of two, so that bfloat16 values down to 2 ** -29 of the largest one
    are exact in float16; smaller ones are off by less than 2 ** -40 of it.
    """

    ROWS = 6
    """Rows of FBGEMM's widest kernel: a remainder goes to a kernel that adds in another order."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        largest = float(weight_OI.abs().max())
        exponent = 15 - math.frexp(largest)[1] if 0 < largest < math.inf else 0
        scale = math.ldexp(1.0, exponent)
        bias = None if bias_O is None else bias_O.float() * scale
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight_OI.float() * scale, bias)
        self._unscale = 1.0 / scale

    def __call__(self, x_TI: Tensor) -> Tensor:
        rows_RI = pad_rows(x_TI.float(), self.ROWS)
        y_RO: Tensor = torch.ops.quantized.linear_dynamic_fp16(rows_RI, self._packed)
        return (y_RO[: x_TI.shape[0]] * self._unscale).to(x_TI.dtype)


def _half_multiple(rows: int) -> int:
    if rows <= HALF_ROWS:
        return HALF_ROWS
    return next((multiple for most, multiple in _HALF_STEPS if rows <= most), 256)


def warm_up(model: nn.Module, rows: int) -> None:
    """Multiplies once in every size up to `rows` rows, where the library keeps something for each.

    So no request waits for a kernel to be made, and memory does not grow as sizes are met.
    """
    layers = {
        (layer.weight.shape, layer.bias is None): layer
        for layer in model.modules()
        if isinstance(layer, Linear) and layer.comes_in_sizes
    }
    sizes = sorted({size + -size % _half_multiple(size) for size in range(1, rows + 1)})
    for layer in layers.values():
        for size in sizes:
            layer(torch.zeros(size, layer.weight.shape[1], dtype=layer.weight.dtype))


def pad_rows(x_TI: Tensor, multiple: int) -> Tensor:
    """[T, I] with zeros behind it, to a multiple of so many rows."""
    missing = -x_TI.shape[0] % multiple
    return F.pad(x_TI, (0, 0, 0, missing)) if missing else x_TI


def _has_products(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype is torch.float32:
        return True
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., size]; the same dtype comes out."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def prologued(x: Tensor, norm: RMSNorm | None, gated: bool) -> Tensor:
    """What `Linear.forward` multiplies: [T, I], normed, or gated from [T, 2 I]."""
    if norm is not None:
        x = norm(x)
    if not gated:
        return x
    gates_TI, values_TI = x.chunk(2, dim=-1)
    return silu(gates_TI) * values_TI


def silu(x: Tensor) -> Tensor:
    """`x / (1 + exp(-x))`, computed in float32.

    torch's own silu takes another exponential for the elements at the end of a thread's share, and so
    rounds an element by where it stands; `exp`, `+` and `/` do not. CUDA's has no such share.
    """
    if x.is_cuda:
        return F.silu(x)
    wide = x.float()
    return (wide / (1.0 + torch.exp(-wide))).to(x.dtype)
