"""Writes a safetensors file whose tensors come piece by piece, several at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

from treadle.models.stored_weights import StoredLayout

_BYTES = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}

WriteAt = Callable[[int, bytes | memoryview], None]
"""Writes bytes at an offset of the file."""


def stored_bytes(layout: StoredLayout) -> int:
    """Bytes of a tensor."""
    return math.prod(layout.shape) * _BYTES[layout.dtype]


class TensorFile:
    """Each tensor has its place from the start. Wide types come first, so that all are aligned."""

    def __init__(self, write_at: WriteAt, layouts: Mapping[str, StoredLayout]) -> None:
        """Writes the header."""
        self._write_at = write_at
        names = sorted(layouts, key=lambda name: (-_BYTES[layouts[name].dtype], name))
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, at = {}, 0
        for name in names:
            end = at + stored_bytes(layouts[name])
            entries[name] = {
                "dtype": layouts[name].dtype,
                "shape": list(layouts[name].shape),
                "data_offsets": [at, end],
            }
            places[name] = (at, end)
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        write_at(0, len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        self._next = {name: start + begin for name, (begin, _) in places.items()}
        self._end = {name: start + end for name, (_, end) in places.items()}

    def append(self, name: str, data: bytes | memoryview) -> None:
        """The next bytes of a tensor."""
        view = memoryview(data).cast("B")
        if self._next[name] + len(view) > self._end[name]:
            raise AssertionError(f"{name} is given more bytes than it has")
        self._write_at(self._next[name], view)
        self._next[name] += len(view)

    def close(self) -> None:
        """Every tensor must have been given all its bytes."""
        if short := [name for name, at in self._next.items() if at != self._end[name]]:
            raise AssertionError(f"{short[0]} and {len(short) - 1} others are not whole")
