"""What quantised products compute, in plain torch: what is served where there are no native kernels for them.

Weights are rounded once, at load; the rows they are multiplied with are rounded to 8 bits as they come, each
group of inputs with its own scale. Shapes: T tokens, I inputs, O outputs, g groups of GROUP_SIZE inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.nn.linear import RMSNorm, pad_rows, silu

GROUP_SIZES = {"int8": 64, "int4": 32}
"""Inputs of a row that share a scale; in int4 the weights of so many inputs share theirs, too."""
GROUP_SIZE = GROUP_SIZES["int4"]
QUANTIZATIONS = ("int8", "int4")
_CUTS = (0.03, 0.06, 0.1)
"""Shares of a group's range that are cut off at either end, to see whether the rest is met better."""


class Int8Weight(NamedTuple):
    """`scale * q`: a scale an output."""

    q_OI: Tensor
    scale_O: Tensor

    def dequantized(self) -> Tensor:
        """Float32 [O, I]."""
        return self.q_OI.float() * self.scale_O[:, None]


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


def quantize_int8(weight_OI: Tensor) -> Int8Weight:
    """To the nearest of 255 steps between the output's largest weight and its negative."""
    wide = weight_OI.float()
    top_O = wide.abs().amax(1)
    inverse_O = torch.where(top_O > 0, 127.0 / top_O, 0.0)
    return Int8Weight((wide * inverse_O[:, None]).round().to(torch.int8), top_O / 127.0)


def quantize_int4(weight_OI: Tensor) -> Int4Weight:
    """To 16 steps over the group's range, or over the part of it that gives the least squared error."""
    out, inputs = weight_OI.shape
    groups = -(-inputs // GROUP_SIZE)
    # What fills the last group up repeats a weight of it, and counts for nothing.
    wide = F.pad(weight_OI.float()[:, None], (0, groups * GROUP_SIZE - inputs), mode="replicate")[:, 0]
    x = wide.view(out, groups, GROUP_SIZE)
    there = (torch.arange(groups * GROUP_SIZE) < inputs).view(groups, GROUP_SIZE)
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
        self._group_size = GROUP_SIZES[quantization]
        rounded = quantize_int8(weight_OI) if quantization == "int8" else quantize_int4(weight_OI)
        self._weight_OI = rounded.dequantized()
        self._bias_O = None if bias_O is None else bias_O.float()

    def __call__(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor:
        """See `Kernel`."""
        if norm is not None:
            x = norm(x)
        if gated:
            gates_TI, values_TI = x.chunk(2, dim=-1)
            x = silu(gates_TI) * values_TI
        rows = x.shape[0]
        y = F.linear(pad_rows(self._rounded(x.float()), 8), self._weight_OI, self._bias_O)[:rows].to(x.dtype)
        return y if residual is None else residual + y

    def _rounded(self, x_TI: Tensor) -> Tensor:
        """To 255 steps between a group's largest magnitude and its negative."""
        inputs = x_TI.shape[1]
        x_Tgn = F.pad(x_TI, (0, -inputs % self._group_size)).unflatten(1, (-1, self._group_size))
        top_Tg1 = x_Tgn.abs().amax(-1, keepdim=True)
        q_Tgn = (x_Tgn * torch.where(top_Tg1 > 0, 127.0 / top_Tg1, 0.0)).round()
        rounded_TI: Tensor = (q_Tgn * (top_Tg1 / 127.0)).flatten(1)[:, :inputs]
        return rounded_TI
