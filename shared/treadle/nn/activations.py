"""Activations whose elements do not depend on where they stand; see `treadle.nn.linear.silu`.

Each may write over what it is given: between two products there is nobody else who reads it, and memory that
is not asked for anew is not cleared anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.models.encoder_config import Activation
from treadle.nn.linear import silu


def gelu(x: Tensor) -> Tensor:
    """GELU by the error function."""
    written: Tensor = torch.ops.aten.gelu_.default(x)
    return written


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel, 2016). torch's own rounds the last elements of a thread's share in
    another way than the rest, on the CPU."""
    if x.is_cuda:
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": torch.relu_,
    "silu": silu,
}
