"""Reads a GGUF file's header from a memory map: every count, length and offset is checked before it is used.

The layout is ggml's documentation of GGUF, versions 2 and 3, little-endian. Nothing is allocated from a
number that the file claims: what it claims must fit into the bytes that are left.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from treadle.errors import InvalidArgument

MAGIC = b"GGUF"

_SCALARS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_MAX_KEY = 65_535
_MAX_COUNT = 65_536
"""Tensors of a file, and pairs of metadata."""
_MAX_STRING = 4 << 20
_MAX_ELEMENTS = 4 << 20
"""Elements of all arrays. The largest vocabularies have 262,144 tokens, and twice as many merges."""
_MAX_TENSOR_NAME = 256
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 16
_MAX_SAID = 300
"""Of what is wrong, which may quote the file: the way out comes after it."""
_SMALLEST_ENTRY = 8 + 4 + 1
"""A metadata pair or tensor has at least a name's length, a type and a byte."""

BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""ggml's number of a format: its name, elements a block, bytes a block."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place: `shape` in elements, slowest dimension first; `offset` and `size` in bytes."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    size: int


class GgufFile:
    """An open GGUF file. `metadata` has plain Python values, arrays as lists."""

    def __init__(self, path: Path) -> None:
        """Opens and checks; raises InvalidArgument: CORRUPT_GGUF, UNSUPPORTED_QUANTIZATION."""
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise corrupt(path, "it has fewer than 24 bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            header = _Header(self._map, path.name)
            self.metadata, self.tensors = header.metadata, header.tensors
            self.header_bytes = header.end
            """Where the header ends and the tensors' data may begin."""
        except BaseException:
            self._map.close()
            raise

    def data(self, tensor: GgufTensor) -> memoryview:
        """The tensor's bytes; release it before the file is closed."""
        return memoryview(self._map)[tensor.offset : tensor.offset + tensor.size]

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # While an error is on its way up, its frames may still hold views of the map; it closes with them.
        with contextlib.suppress(BufferError):
            self._map.close()


def corrupt(path: Path | str, what: str) -> InvalidArgument:
    """The error that says what is wrong with which file."""
    name = path if isinstance(path, str) else path.name
    return InvalidArgument(
        f"{name} is not a whole GGUF file: {what[:_MAX_SAID]}; download or convert it again",
        reason="CORRUPT_GGUF",
    )


class _Header:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data, self._name, self._at, self._end = data, name, 0, len(data)
        self._elements = 0
        if self._take(4) != MAGIC:
            raise corrupt(name, "it does not begin with GGUF")
        version: int = self._number("I")
        if version not in (2, 3):
            raise corrupt(name, f"its version is {version}; versions 2 and 3, little-endian, are read")
        tensors, pairs = self._count("tensors"), self._count("metadata pairs")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string(_MAX_KEY, "a metadata key")
            if key in self.metadata:
                raise corrupt(name, f"the metadata has {key!r} twice")
            self.metadata[key] = self._value(key)
        self.tensors = self._tensors(tensors)
        self.end = self._at

    def _take(self, count: int) -> bytes:
        if count > self._end - self._at:
            raise corrupt(self._name, f"it ends within its header, at byte {self._end}")
        start, self._at = self._at, self._at + count
        return self._data[start : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, what: str) -> int:
        count: int = self._number("Q")
        if count * _SMALLEST_ENTRY > self._end - self._at:
            raise corrupt(self._name, f"it claims {count} {what}, more than its size can hold")
        if count > _MAX_COUNT:
            raise corrupt(self._name, f"it claims {count} {what}; at most {_MAX_COUNT} are read")
        return count

    def _string(self, longest: int, what: str) -> str:
        length: int = self._number("Q")
        if length > min(longest, _MAX_STRING, self._end - self._at):
            raise corrupt(self._name, f"{what} claims {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise corrupt(self._name, f"{what} is not UTF-8") from None

    def _value(self, key: str) -> Any:
        kind: int = self._number("I")
        if kind == _ARRAY:
            return self._array(key)
        return self._reader(kind, key)()

    def _reader(self, kind: int, key: str) -> Callable[[], Any]:
        if kind == _STRING:
            return lambda: self._string(self._end, f"the metadata value {key!r}")
        if kind == _BOOL:
            return lambda: bool(self._number("B"))
        if (code := _SCALARS.get(kind)) is None:
            raise corrupt(self._name, f"the metadata value {key!r} has the unknown type {kind}")
        return lambda: self._number(code)

    def _array(self, key: str) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        code = _SCALARS.get(kind)
        smallest = 8 if kind == _STRING else struct.calcsize("<" + code) if code else 0
        if not smallest:
            raise corrupt(self._name, f"the array {key!r} has elements of type {kind}, which are not read")
        if count * smallest > self._end - self._at:
            raise corrupt(self._name, f"the array {key!r} claims {count} elements, more than the file has")
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            raise corrupt(self._name, f"its arrays claim more than {_MAX_ELEMENTS} elements")
        if kind == _STRING:
            return [self._string(self._end, f"an element of {key!r}") for _ in range(count)]
        values = list(struct.unpack(f"<{count}{code}", self._take(count * smallest)))
        return [bool(value) for value in values] if kind == _BOOL else values

    def _tensors(self, count: int) -> dict[str, GgufTensor]:
        entries = [self._entry() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if (
            type(alignment) is not int
            or not 8 <= alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1) != 0
        ):
            raise corrupt(self._name, f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, form, shape, relative, size in entries:
            if name in tensors:
                raise corrupt(self._name, f"the tensor {name!r} is there twice")
            if relative % alignment:
                raise corrupt(self._name, f"the tensor {name!r} is not aligned to {alignment} bytes")
            if start + relative + size > self._end:
                raise corrupt(
                    self._name,
                    f"the tensor {name!r} ends at byte {start + relative + size}, the file at {self._end}",
                )
            tensors[name] = GgufTensor(name, form, shape, start + relative, size)
        self._refuse_overlap(tensors)
        return tensors

    def _refuse_overlap(self, tensors: dict[str, GgufTensor]) -> None:
        last_end, last_name = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < last_end:
                raise corrupt(self._name, f"the tensors {last_name!r} and {tensor.name!r} overlap")
            last_end, last_name = tensor.offset + tensor.size, tensor.name

    def _entry(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name = self._string(_MAX_TENSOR_NAME, "a tensor's name")
        dimensions: int = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise corrupt(self._name, f"the tensor {name!r} has {dimensions} dimensions")
        fastest_first = [int(self._number("Q")) for _ in range(dimensions)]
        kind: int = self._number("I")
        offset: int = self._number("Q")
        if kind not in BLOCKS:
            raise InvalidArgument(
                f"{self._name}: the tensor {name!r} has ggml's format {kind}; these are converted: "
                + ", ".join(form for form, _, _ in BLOCKS.values()),
                reason="UNSUPPORTED_QUANTIZATION",
            )
        form, per_block, block_bytes = BLOCKS[kind]
        elements = math.prod(fastest_first)
        # Python's integers do not wrap, so that a product past 64 bits is simply larger than the file.
        if elements == 0 or fastest_first[0] % per_block:
            raise corrupt(self._name, f"the tensor {name!r} has the shape {fastest_first} in {form}")
        size = elements // per_block * block_bytes
        if size > self._end:
            raise corrupt(self._name, f"the tensor {name!r} claims {size} bytes, the file has {self._end}")
        return name, form, tuple(reversed(fastest_first)), offset, size
