"""What quantised products compute, in plain torch: what is served where there are no native kernels for them.

Weights are rounded as `treadle.models.quantization` defines it, at load or before; the rows they are
multiplied with are rounded to 8 bits as they come, each group of inputs with its own scale.

Shapes: T tokens, I inputs, O outputs, W words, g groups of n inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.models import quantization as rounding
from treadle.models.quantization_config import group_size
from treadle.nn.linear import RMSNorm, pad_rows, prologued


class Int8Weight(NamedTuple):
    """`scale * q`: int8 [O, I], and a float32 scale for each group of inputs."""

    q_OI: Tensor
    scale_Og: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.q_OI.shape[0], self.q_OI.shape[1]

    def dequantized(self, group: int = 0) -> Tensor:
        """Float32 [O, I]; `group` inputs share a scale, 0: as stored weights have it."""
        group = group or group_size("int8", self.q_OI.shape[1])
        return self.q_OI.float() * _each(self.scale_Og, group, self.q_OI.shape[1])


class Int4Weight(NamedTuple):
    """`scale * q + minimum`: q from 0 to 15, eight a word, the first in the lowest bits; bfloat16 scale and
    minimum for each group of inputs."""

    words_OW: Tensor
    scale_Og: Tensor
    minimum_Og: Tensor
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.words_OW.shape[0], self.in_features

    def dequantized(self, group: int = 0) -> Tensor:
        """Float32 [O, I]; `group` inputs share a scale, 0: as stored weights have it."""
        group = group or group_size("int4", self.in_features)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        q_OI = ((self.words_OW[..., None] >> shifts) & 15).flatten(1)[:, : self.in_features]
        scale_OI = _each(self.scale_Og.float(), group, self.in_features)
        return q_OI.float() * scale_OI + _each(self.minimum_Og.float(), group, self.in_features)


QuantizedWeight = Int8Weight | Int4Weight


def _each(of_group_Og: Tensor, group: int, inputs: int) -> Tensor:
    """What each input's group has, [O, I]."""
    return of_group_Og.repeat_interleave(group, dim=1)[:, :inputs]


def quantize(weight_OI: Tensor, quantization: str, group: int = 0) -> QuantizedWeight:
    """The weight as "int8" or "int4"; see `treadle.models.quantization`.

    `group`: inputs of "int8" that share a scale; 0: as stored weights have it.
    """
    wide_OI = weight_OI.float().contiguous().numpy()
    if quantization == "int8":
        return Int8Weight(*map(torch.from_numpy, rounding.quantize_int8(wide_OI, group)))
    q_OI, scale_Og, minimum_Og = rounding.quantize_int4(wide_OI)
    scale, minimum = (
        torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) for bits in (scale_Og, minimum_Og)
    )
    return Int4Weight(torch.from_numpy(rounding.pack_words(q_OI)), scale, minimum, weight_OI.shape[1])


def dequantize_mxfp4(packed_OB: Tensor, scale_Og: Tensor, in_features: int) -> Tensor:
    """Bfloat16 [O, I] of two codes a byte and the blocks' exponents (`treadle.models.quantization.Mxfp4`).

    Exact: every E2M1 times a power of two is a bfloat16.
    """
    magnitudes = torch.from_numpy(rounding.E2M1)
    values = torch.cat([magnitudes, -magnitudes])
    code_OI = torch.stack([packed_OB & 15, packed_OB >> 4], dim=-1).flatten(1)[:, :in_features]
    exponent_Og = scale_Og.int() - 127
    scale = torch.ldexp(torch.ones_like(exponent_Og, dtype=torch.float64), exponent_Og)
    return (
        values[code_OI.int()] * _each(scale.float(), group_size("mxfp4", in_features), in_features)
    ).bfloat16()


class QuantizedLinear:
    """A `treadle.nn.linear.Kernel`: quantised weights kept as float32, rows rounded as the kernels do."""

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None, group: int = 0) -> None:
        form = "int8" if isinstance(weight, Int8Weight) else "int4"
        self._group_size = group or group_size(form, weight.shape[1])
        self._weight_OI = weight.dequantized(group)
        self._bias_O = None if bias_O is None else bias_O.float()

    def __call__(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor:
        """See `Kernel`."""
        x = prologued(x, norm, gated)
        rows = x.shape[0]
        y = F.linear(pad_rows(self._rounded(x.float()), 8), self._weight_OI, self._bias_O)[:rows].to(x.dtype)
        return y if residual is None else residual + y

    def _rounded(self, x_TI: Tensor) -> Tensor:
        """The rows, each group to whole numbers of -127 to 127 times a scale."""
        x_Tgn = F.pad(x_TI, (0, -x_TI.shape[1] % self._group_size)).unflatten(1, (-1, self._group_size))
        top_Tg1 = x_Tgn.abs().amax(-1, keepdim=True)
        q_Tgn = (x_Tgn * torch.where(top_Tg1 > 0, 127.0 / top_Tg1, 0.0)).round()
        rounded_TI: Tensor = (q_Tgn * (top_Tg1 / 127.0)).flatten(1)
        return rounded_TI[:, : x_TI.shape[1]]
