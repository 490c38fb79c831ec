"""What quantised products compute, in plain torch: what is served where there are no native kernels for them.

Weights are rounded once, at load; the rows they are multiplied with are rounded to 8 bits as they come, each
group of inputs with its own scale. Shapes: T tokens, I inputs, O outputs, g groups of n inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.nn.linear import RMSNorm, pad_rows, prologued

_INT8_GROUPS = (96, 64)
"""The first that divides a product's inputs, else the last: each group costs time, and each input of one
precision."""
_INT4_GROUP = 32
_CUTS = (0.03, 0.06, 0.1)
"""Shares of a group's range that are cut off at either end, to see whether the rest is met better."""


class Int8Weight(NamedTuple):
    """`scale * q`: a scale for each group of inputs."""

    q_Ogn: Tensor
    scale_Og: Tensor
    in_features: int

    def dequantized(self) -> Tensor:
        """Float32 [O, I]."""
        return (self.q_Ogn.float() * self.scale_Og[..., None]).flatten(1)[:, : self.in_features]


class Int4Weight(NamedTuple):
    """`scale * q + minimum`, q from 0 to 15; scale and minimum of a group are bfloat16."""

    q_Ogn: Tensor
    scale_Og: Tensor
    minimum_Og: Tensor
    in_features: int

    def dequantized(self) -> Tensor:
        """Float32 [O, I]."""
        wide = self.q_Ogn.float() * self.scale_Og.float()[..., None] + self.minimum_Og.float()[..., None]
        return wide.flatten(1)[:, : self.in_features]


def group_size(quantization: str, in_features: int) -> int:
    """Inputs that share a scale, of a row and of an output's weights; 0: no quantisation."""
    if quantization == "int8":
        return next((size for size in _INT8_GROUPS if in_features % size == 0), _INT8_GROUPS[-1])
    return _INT4_GROUP if quantization == "int4" else 0


def quantize_int8(weight_OI: Tensor) -> Int8Weight:
    """To the nearest of 255 steps between the group's largest weight and its negative."""
    q_Ogn, scale_Og1 = _to_bytes(weight_OI.float(), group_size("int8", weight_OI.shape[1]))
    return Int8Weight(q_Ogn.to(torch.int8), scale_Og1.squeeze(-1), weight_OI.shape[1])


def _to_bytes(x_RI: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of -127 to 127 [R, g, n], and the scales [R, g, 1] that give the rows back."""
    x_Rgn = F.pad(x_RI, (0, -x_RI.shape[1] % group_size)).unflatten(1, (-1, group_size))
    top_Rg1 = x_Rgn.abs().amax(-1, keepdim=True)
    return (x_Rgn * torch.where(top_Rg1 > 0, 127.0 / top_Rg1, 0.0)).round(), top_Rg1 / 127.0


def quantize_int4(weight_OI: Tensor) -> Int4Weight:
    """To 16 steps over the group's range, or over the part of it that gives the least squared error."""
    out, inputs = weight_OI.shape
    groups = -(-inputs // _INT4_GROUP)
    # What fills the last group up repeats a weight of it, and counts for nothing.
    wide = F.pad(weight_OI.float()[:, None], (0, groups * _INT4_GROUP - inputs), mode="replicate")[:, 0]
    x = wide.view(out, groups, _INT4_GROUP)
    there = (torch.arange(groups * _INT4_GROUP) < inputs).view(groups, _INT4_GROUP)
    low, high = x.amin(-1), x.amax(-1)
    best = _fit(x, there, low, high)
    for cut in _CUTS:
        by = (high - low) * cut
        for ends in ((low + by, high), (low, high - by), (low + by, high - by)):
            fit = _fit(x, there, *ends)
            better = fit.error < best.error
            best = _Fit(
                *(
                    torch.where(better.unsqueeze(-1) if one.dim() == 3 else better, one, other)
                    for one, other in zip(fit, best, strict=True)
                )
            )
    return Int4Weight(best.q, best.scale, best.minimum, inputs)


class _Fit(NamedTuple):
    q: Tensor
    scale: Tensor
    minimum: Tensor
    error: Tensor


def _fit(x: Tensor, there: Tensor, low: Tensor, high: Tensor) -> _Fit:
    scale, minimum = ((high - low) / 15).bfloat16(), low.bfloat16()
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)[..., None]
    q = ((x - minimum.float()[..., None]) * inverse + 0.5).clamp(0, 15.5).to(torch.uint8)
    off = q.float() * scale.float()[..., None] + minimum.float()[..., None] - x
    return _Fit(q, scale, minimum, (off.square() * there).sum(-1))


class QuantizedLinear:
    """A `treadle.nn.linear.Kernel`: quantised weights kept as float32, rows rounded as the kernels do."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str) -> None:
        self._group_size = group_size(quantization, weight_OI.shape[1])
        rounded = quantize_int8(weight_OI) if quantization == "int8" else quantize_int4(weight_OI)
        self._weight_OI = rounded.dequantized()
        self._bias_O = None if bias_O is None else bias_O.float()

    def __call__(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor:
        """See `Kernel`."""
        x = prologued(x, norm, gated)
        rows = x.shape[0]
        y = F.linear(pad_rows(self._rounded(x.float()), 8), self._weight_OI, self._bias_O)[:rows].to(x.dtype)
        return y if residual is None else residual + y

    def _rounded(self, x_TI: Tensor) -> Tensor:
        q_Tgn, scale_Tg1 = _to_bytes(x_TI, self._group_size)
        return (q_Tgn * scale_Tg1).flatten(1)[:, : x_TI.shape[1]]
