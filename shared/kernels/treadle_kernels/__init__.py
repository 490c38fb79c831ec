"""Products and attention for CPUs, in C++; which instruction set they use is chosen as they are loaded.

Everything takes and gives float32 at addresses: whoever calls sees to sizes, contiguity and lifetimes. The
interpreter's lock is free while a kernel runs. No dependency but OpenMP's runtime: where torch is in the
process already, its own is used.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

__all__ = [
    "AttentionCall",
    "Cache",
    "Call",
    "Kind",
    "LinearCall",
    "Operation",
    "PackedWeight",
    "Program",
    "Prologue",
    "Step",
    "TextAttentionCall",
    "level",
    "levels",
    "set_level",
]

_LIBRARY = Path(__file__).with_name("libtreadle_kernels.so")


class Kind(enum.IntEnum):
    """How weights or cached keys and values are kept."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    """Of weights and rows: a scale a group of inputs. Of a cache: a scale a token and head."""
    INT4 = 3
    """Scale and minimum for each group of inputs; rows as for INT8."""


class Prologue(enum.IntEnum):
    """What is done to a product's rows before it."""

    PLAIN = 0
    RMS_NORM = 1
    SILU_GATE = 2


class Operation(enum.IntEnum):
    """What a call computes."""

    LINEAR = 0
    ATTENTION = 1
    TEXT_ATTENTION = 2


class Step(ctypes.Structure):
    """One step's tokens, sequence after sequence; see kernels.h."""

    _fields_ = [
        ("rows", c_int64),
        ("sequences", c_int64),
        ("row_of", c_void_p),
        ("start_of", c_void_p),
        ("table_of", c_void_p),
        ("tables", c_void_p),
        ("positions", c_void_p),
    ]


class Cache(ctypes.Structure):
    """One layer's keys and values; see kernels.h."""

    _fields_ = [
        ("kind", c_int32),
        ("block", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
    ]


class LinearCall(ctypes.Structure):
    """y = prologue(x) W^T + bias + residual, over contiguous rows; `residual` may be `y`."""

    _fields_ = [
        ("weight", c_void_p),
        ("x", c_void_p),
        ("norm_weight", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("prologue", c_int32),
        ("epsilon", c_float),
    ]


class AttentionCall(ctypes.Structure):
    """Writes a step's keys and values into a layer's cache, and attends; see kernels.h."""

    _fields_ = [
        ("cache", Cache),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("head_dim", c_int64),
        ("qkv", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("y", c_void_p),
        ("window", c_int64),
        ("epsilon", c_float),
        ("scale", c_float),
    ]


class TextAttentionCall(ctypes.Structure):
    """Attends inside each text of a step, both ways; `head_dim` is a multiple of 16; see kernels.h."""

    _fields_ = [
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("qkv", c_void_p),
        ("y", c_void_p),
        ("scale", c_float),
    ]


class Call(ctypes.Structure):
    """One of the three."""

    _fields_ = [
        ("operation", c_int32),
        ("linear", LinearCall),
        ("attention", AttentionCall),
        ("texts", TextAttentionCall),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_LIBRARY))
    declare = {
        "treadle_level": (c_char_p, [c_int32]),
        "treadle_level_runs": (c_int32, [c_int32]),
        "treadle_chosen_level": (c_char_p, []),
        "treadle_choose_level": (c_int32, [c_char_p]),
        "treadle_pack": (
            c_void_p,
            [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int32],
        ),
        "treadle_pack_quantized": (
            c_void_p,
            [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int32],
        ),
        "treadle_unpack": (None, [c_void_p, c_void_p]),
        "treadle_weight_bytes": (c_int64, [c_void_p]),
        "treadle_release": (None, [c_void_p]),
        "treadle_run": (None, [POINTER(Call), c_int64, c_int64, POINTER(Step), c_int32]),
    }
    for name, (result, arguments) in declare.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def levels() -> list[str]:
    """The instruction sets that this CPU has, the best first."""
    library = _library()
    there = []
    index = 0
    while (name := library.treadle_level(index)) is not None:
        if library.treadle_level_runs(index):
            there.append(name.decode())
        index += 1
    return there


def level() -> str:
    """The instruction set that is used."""
    name: bytes = _library().treadle_chosen_level()
    return name.decode()


def set_level(name: str) -> None:
    """Uses another instruction set from now on; raises ValueError where this CPU lacks it."""
    if _library().treadle_choose_level(name.encode()):
        raise ValueError(f"{name!r} is none of this CPU's: {', '.join(levels())}")


def _check_group(kind: Kind, group_size: int) -> None:
    if kind in (Kind.INT8, Kind.INT4) and (group_size < 16 or group_size % 16):
        raise ValueError(f"group_size must be a multiple of 16, not {group_size}")


class PackedWeight:
    """A weight [out, in] in the order in which the kernels read it. It owns its memory."""

    def __init__(
        self,
        source: int,
        source_kind: Kind,
        out_features: int,
        in_features: int,
        *,
        bias: int | None = None,
        kind: Kind,
        group_size: int = 0,
        threads: int = 1,
    ) -> None:
        """From float32 or bfloat16 rows at `source`; `bias` is float32. Raises MemoryError without memory."""
        _check_group(kind, group_size)
        self._own(
            _library().treadle_pack(
                source, source_kind, out_features, in_features, bias, kind, group_size, threads
            ),
            out_features,
            in_features,
            kind,
        )

    @classmethod
    def of_quantized(
        cls,
        numbers: int,
        scale: int,
        minimum: int | None,
        out_features: int,
        in_features: int,
        *,
        bias: int | None = None,
        kind: Kind,
        group_size: int,
        threads: int = 1,
    ) -> PackedWeight:
        """From rows that were quantised before, as pack.h has them. Raises MemoryError without memory."""
        _check_group(kind, group_size)
        weight = cls.__new__(cls)
        weight._own(
            _library().treadle_pack_quantized(
                numbers, scale, minimum, out_features, in_features, bias, kind, group_size, threads
            ),
            out_features,
            in_features,
            kind,
        )
        return weight

    def _own(self, handle: int | None, out_features: int, in_features: int, kind: Kind) -> None:
        if not handle:
            raise MemoryError(f"no memory for a weight of {out_features} x {in_features}")
        self.out_features, self.in_features, self.kind = out_features, in_features, kind
        self._handle = handle
        library = _library()
        weakref.finalize(self, library.treadle_release, handle)
        self.nbytes: int = library.treadle_weight_bytes(handle)

    def call(
        self,
        x: int,
        y: int,
        *,
        prologue: Prologue = Prologue.PLAIN,
        norm_weight: int | None = None,
        epsilon: float = 0.0,
        residual: int | None = None,
    ) -> Call:
        """The product as a call, with the addresses of float32 rows."""
        linear = LinearCall(self._handle, x, norm_weight, residual, y, prologue, epsilon)
        return Call(operation=Operation.LINEAR, linear=linear)

    def unpack(self, out: int) -> None:
        """The weights as the kernels see them, as [out, in] floats."""
        _library().treadle_unpack(self._handle, out)


class Program:
    """Calls that run one after another, by the same threads from the first to the last.

    What they point at is not kept alive here.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = (Call * len(calls))(*calls)
        self._run = _library().treadle_run

    def run(self, rows: int, threads: int, step: Step | None = None) -> None:
        """Runs all calls over so many rows; `step` is for those that attend."""
        self._run(self._calls, len(self._calls), rows, step, threads)
