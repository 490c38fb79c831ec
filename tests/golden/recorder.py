"""A stand-in for the capture of CUDA graphs, on any device.

Like a graph, a recording is a list of operations over fixed memory: what Python decided as it was made is
fixed, and what is read on the host (`tolist`, `item`, a length by a value) cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


class Recorder:
    """A `Capture` that records torch's operations, and counts."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_operations = 0
        self.num_replayed = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.no_grad():
            recording = make_fx(compute)()
        out = torch.empty_like(compute())
        self.num_recorded += 1
        self.num_operations += sum(node.op == "call_function" for node in recording.graph.nodes)

        def replay() -> Tensor:
            self.num_replayed += 1
            return out.copy_(recording())

        return replay


class Rerunner:
    """A `Capture` that runs the function anew: for stand-ins of packages, which look at numbers."""

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        out = compute().clone()
        return lambda: out.copy_(compute())
