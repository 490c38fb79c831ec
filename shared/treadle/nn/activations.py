"""Activations whose elements do not depend on where they stand; see `treadle.nn.linear.silu`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.models.encoder_config import Activation
from treadle.nn.linear import silu


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel, 2016). torch's own rounds the last elements of a thread's share in
    another way than the rest, on the CPU."""
    if x.is_cuda:
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": silu,
}
