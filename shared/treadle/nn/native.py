"""Products by the native kernels: float32 rows in and out, weights packed once at load.

The package `treadle_kernels` (shared/kernels) is optional: without it, and off the CPU, torch multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from treadle.models.quantization_config import group_size
from treadle.nn.linear import RMSNorm
from treadle.nn.quantization import Int8Weight, QuantizedWeight

if TYPE_CHECKING:
    import treadle_kernels

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
    """A `treadle.nn.linear.Kernel`. The weights are those of `pack` or `pack_quantized`."""

    def __init__(self, packed: treadle_kernels.PackedWeight) -> None:
        self.packed = packed
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self._threads = torch.get_num_threads()

    def __call__(self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None) -> Tensor:
        """See `Kernel`; all tensors are contiguous float32, and `residual` becomes the result.

        Of a program's buffer the product is only noted.
        """
        if isinstance(x, Buffer):
            y = x.recorder.output(self.out_features) if residual is None else residual
            x.recorder.calls.append(self._call(x, norm, gated, residual, y))
            return y
        import treadle_kernels as native

        y = x.new_empty((x.shape[0], self.out_features)) if residual is None else residual
        native.Program([self._call(x, norm, gated, residual, y)]).run(x.shape[0], self._threads)
        return y

    def _call(
        self, x: Tensor, norm: RMSNorm | None, gated: bool, residual: Tensor | None, y: Tensor
    ) -> treadle_kernels.Call:
        import treadle_kernels as native

        plain, normed, gate = native.Prologue
        return self.packed.call(
            x.data_ptr(),
            y.data_ptr(),
            prologue=gate if gated else plain if norm is None else normed,
            norm_weight=None if norm is None else norm.weight.data_ptr(),
            epsilon=0.0 if norm is None else norm.eps,
            residual=None if residual is None else y.data_ptr(),
        )


def pack(weight_OI: Tensor, bias_O: Tensor | None, quantization: str, group: int = 0) -> NativeLinear:
    """The product with a float weight; `quantization`: "" for the weight's own dtype, "int8" or "int4".

    `group`: quantised inputs that share a scale; 0: as stored weights have it.
    """
    import treadle_kernels as native

    weight_OI = weight_OI.contiguous()
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    source = native.Kind.FLOAT32 if weight_OI.dtype is torch.float32 else native.Kind.BFLOAT16
    out_features, in_features = weight_OI.shape
    return NativeLinear(
        native.PackedWeight(
            weight_OI.data_ptr(),
            source,
            out_features,
            in_features,
            bias=None if bias_O is None else bias_O.data_ptr(),
            kind={"": source, "int8": native.Kind.INT8, "int4": native.Kind.INT4}[quantization],
            group_size=group or group_size(quantization, in_features),
            threads=torch.get_num_threads(),
        )
    )


def pack_quantized(weight: QuantizedWeight, bias_O: Tensor | None) -> NativeLinear:
    """The product with a weight that is quantised already: it is put in order, nothing is computed."""
    import treadle_kernels as native

    if isinstance(weight, Int8Weight):
        kind, form, numbers, minimum = native.Kind.INT8, "int8", weight.q_OI.contiguous(), None
    else:
        kind, form, numbers = native.Kind.INT4, "int4", weight.words_OW.contiguous()
        minimum = weight.minimum_Og.contiguous()
    scale = weight.scale_Og.contiguous()
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    out_features, in_features = weight.shape
    return NativeLinear(
        native.PackedWeight.of_quantized(
            numbers.data_ptr(),
            scale.data_ptr(),
            None if minimum is None else minimum.data_ptr(),
            out_features,
            in_features,
            bias=None if bias_O is None else bias_O.data_ptr(),
            kind=kind,
            group_size=group_size(form, in_features),
            threads=torch.get_num_threads(),
        )
    )


class NativeTextAttention:
    """A `treadle.nn.encoder_attention.TextAttention`, for heads of 16, 32, … elements."""

    def __init__(self, lengths: Sequence[int], num_heads: int) -> None:
        import treadle_kernels as native

        self._num_heads, self._threads = num_heads, torch.get_num_threads()
        self._row_of = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self._rows = int(self._row_of[-1])
        self._step = native.Step(rows=self._rows, sequences=len(lengths), row_of=self._row_of.ctypes.data)

    def __call__(self, qkv_TX: Tensor) -> Tensor:
        """See `TextAttention`; contiguous float32."""
        import treadle_kernels as native

        width = qkv_TX.shape[1] // 3
        out_TE = qkv_TX.new_empty((self._rows, width))
        dim = width // self._num_heads
        call = native.TextAttentionCall(self._num_heads, dim, qkv_TX.data_ptr(), out_TE.data_ptr(), dim**-0.5)
        program = native.Program([native.Call(operation=native.Operation.TEXT_ATTENTION, texts=call)])
        program.run(self._rows, self._threads, self._step)
        return out_TE


class Buffer(Tensor):
    """A tensor of a program: what is computed with it is noted, and runs later over any number of rows."""

    recorder: Recorder

    @staticmethod
    def of(tensor: Tensor, recorder: Recorder) -> Buffer:
        """The tensor's memory as a buffer."""
        buffer = tensor.as_subclass(Buffer)
        buffer.recorder = recorder
        return buffer


class Recorder:
    """Notes the native calls of layers that are run on its buffers, each with room for `rows` rows.

    A layer's results live until the next one of their kind, so all layers share them.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.calls: list[treadle_kernels.Call] = []
        self._outputs: dict[tuple[str, int], Buffer] = {}

    def buffer(self, width: int) -> Buffer:
        """A buffer [rows, width] of its own."""
        return Buffer.of(torch.zeros(self.rows, width), self)

    def output(self, width: int, kind: str = "linear") -> Buffer:
        """Where results of this kind and width go."""
        if (kind, width) not in self._outputs:
            self._outputs[kind, width] = self.buffer(width)
        return self._outputs[kind, width]
