"""Stored floats as float32, some rows at a time, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treadle.errors import DataLoss
from treadle.models.bfloat16 import round_to_bfloat16, widen_bfloat16
from treadle_registry.formats.safetensors_file import StoredTensor, read_header

Floats = NDArray[np.float32]

FLOAT_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""As safetensors names them."""
_PIECE = 1 << 20
"""Values at a time, about; at least a row."""


class FloatTensors(Protocol):
    """Where the values of a model's tensors come from."""

    def pieces(self, name: str) -> Iterator[Floats]:
        """All values of a tensor in order."""
        ...


class StoredFloats:
    """The floating tensors of safetensors files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads the headers; raises InvalidArgument (CORRUPT_WEIGHTS)."""
        self._places: dict[str, tuple[Path, StoredTensor]] = {}
        for path in paths:
            self._places |= {name: (path, tensor) for name, tensor in read_header(path).items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {name: tensor.shape for name, (_, tensor) in self._places.items()}

    def dtype(self, name: str) -> str:
        """As safetensors names it."""
        return self._places[name][1].dtype

    def pieces(self, name: str) -> Iterator[Floats]:
        """Some whole rows [R, ...] of a tensor at a time; raises DataLoss where the file ends within them."""
        path, tensor = self._places[name]
        rest = tensor.shape[1:]
        row_bytes = tensor.size // tensor.shape[0]
        step = max(1, _PIECE // math.prod(rest)) * row_bytes
        with path.open("rb") as file:
            file.seek(tensor.offset)
            for at in range(0, tensor.size, step):
                raw = file.read(min(step, tensor.size - at))
                if len(raw) < min(step, tensor.size - at):
                    raise DataLoss(f"{path.name} ends within {name}", reason="DAMAGED_FILE")
                yield _widened(raw, tensor.dtype).reshape(-1, *rest)


def _widened(raw: bytes, dtype: str) -> Floats:
    if dtype == "BF16":
        return widen_bfloat16(np.frombuffer(raw, "<u2"))
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)


def encode(values: Floats, dtype: str) -> memoryview:
    """The bytes of the nearest values of that type, ties to even; what is beyond float16 becomes infinity."""
    if dtype == "BF16":
        return round_to_bfloat16(values).data.cast("B")
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(values, np.float32 if dtype == "F32" else np.float16)
    return narrow.data.cast("B")
