"""Products by the native kernels: float32 rows in and out, weights packed once at load.

The package `treadle_kernels` (shared/kernels) is optional: without it, and off the CPU, torch multiplies.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from treadle.nn.linear import RMSNorm
from treadle.nn.quantization import GROUP_SIZES

SOURCES = (torch.float32, torch.bfloat16)
"""Dtypes that weights are packed from, and computed in."""


@functools.cache
def is_installed() -> bool:
    """Whether the package is there, and its library loads here."""
    try:
        import treadle_kernels

        treadle_kernels.level()
    except (ImportError, OSError):
        return False
    return True


class NativeLinear:
    """A `treadle.nn.linear.Kernel`. `quantization`: "" for the weight's own dtype, "int8" or "int4"."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str) -> None:
        import treadle_kernels as native

        weight_OI = weight_OI.contiguous()
        bias_O = None if bias_O is None else bias_O.float().contiguous()
        source = native.Kind.FLOAT32 if weight_OI.dtype is torch.float32 else native.Kind.BFLOAT16
        kind = {"": source, "int8": native.Kind.INT8, "int4": native.Kind.INT4}[quantization]
        self.out_features, self.in_features = weight_OI.shape
        self._threads = torch.get_num_threads()
        self.packed = native.PackedWeight(
            weight_OI.data_ptr(),
            source,
            self.out_features,
            self.in_features,
            bias=None if bias_O is None else bias_O.data_ptr(),
            kind=kind,
            group_size=GROUP_SIZES.get(quantization, 0),
            threads=self._threads,
        )
        self._plain, self._norm, self._gate = native.Prologue

    def __call__(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor:
        """See `Kernel`; all tensors are contiguous float32, and `residual` becomes the result."""
        rows = x.shape[0]
        y = x.new_empty((rows, self.out_features)) if residual is None else residual
        prologue = self._gate if gated else self._plain if norm is None else self._norm
        self.packed.linear(
            x.data_ptr(),
            rows,
            y.data_ptr(),
            prologue=prologue,
            norm_weight=None if norm is None else norm.weight.data_ptr(),
            epsilon=0.0 if norm is None else norm.eps,
            residual=None if residual is None else y.data_ptr(),
            threads=self._threads,
        )
        return y
