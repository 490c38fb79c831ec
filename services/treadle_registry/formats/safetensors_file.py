"""Reads a safetensors header strictly, and writes the format tensor by tensor as the bytes come.

The format: eight bytes of header length, little-endian; a JSON object of name to dtype, shape and
[begin, end) offsets, padded with spaces; then the data. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import InvalidArgument
from treadle_registry.formats.safetensors_header import MAX_HEADER, header_entries
from treadle_registry.store.manifest import DtypeShare, shares_of

_MAX_DIMENSIONS = 8
_MAX_NUMBER = 1 << 63
"""No file is as long. Numbers without a bound would take minutes to multiply."""
_PIECE = 1 << 20
_MAX_SAID = 300
"""Of what is wrong, which may quote the file: the way out comes after it."""
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's type, shape, and place in its file in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def tensor_pieces(path: Path, tensor: StoredTensor) -> Iterator[bytes]:
    """A tensor's bytes in order, a megabyte at a time; raises InvalidArgument (CORRUPT_WEIGHTS) where the
    file ends within them."""
    with path.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.size
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise InvalidArgument(f"{path.name} ends within its tensors", reason="CORRUPT_WEIGHTS")
            left -= len(piece)
            yield piece


def dtype_shares(tensors: Mapping[str, StoredTensor]) -> tuple[DtypeShare, ...]:
    """Which types the tensors have, the most parameters first."""
    return shares_of((tensor.dtype, tensor.elements, tensor.size) for tensor in tensors.values())


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file; raises InvalidArgument (CORRUPT_WEIGHTS) that names it."""
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > total - 8:
            raise _corrupt(path, f"its header claims {length} bytes and the file has {total}")
        if length > MAX_HEADER:
            raise _corrupt(path, f"its header claims {length} bytes; at most {MAX_HEADER} are read")
        text = file.read(length)
    start = 8 + length
    tensors: dict[str, StoredTensor] = {}
    try:
        for name, entry in header_entries(text.decode()):
            if name in tensors:
                raise _corrupt(path, f"the tensor {name[:100]!r} is there twice")
            tensors[name] = _entry(path, name, entry, start)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header cannot be read: {error}") from error
    _check_cover(path, tensors, start, total)
    return tensors


def _entry(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    try:
        if not isinstance(entry, dict):
            raise TypeError
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError
        if not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in (begin, end, *shape)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _corrupt(
            path,
            f"its entry for {name[:100]!r} is not a dtype, a shape of at most {_MAX_DIMENSIONS} dimensions "
            "and two offsets",
        ) from None
    if dtype not in _BITS:
        raise _corrupt(path, f"the tensor {name[:100]!r} has the unknown dtype {dtype!r}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise _corrupt(path, f"the tensor {name[:100]!r} of shape {shape} in {dtype} has {end - begin} bytes")
    return StoredTensor(dtype, tuple(shape), start + begin, end - begin)


def _check_cover(path: Path, tensors: Mapping[str, StoredTensor], start: int, total: int) -> None:
    """The tensors lie one after another without a hole or an overlap up to the file's end."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != at:
            raise _corrupt(path, f"the tensor {name[:100]!r} begins at {tensor.offset} where {at} is due")
        at += tensor.size
    if at != total:
        raise _corrupt(path, f"its tensors end at byte {at}, the file at {total}; it may be truncated")


def _corrupt(path: Path, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"{path.name} is not a whole safetensors file: {what[:_MAX_SAID]}; download it again",
        reason="CORRUPT_WEIGHTS",
    )


def bfloat16_header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The header of a file of bfloat16 tensors that follow in the order of `shapes`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


TensorDigests = dict[str, tuple[str, tuple[int, ...], str]]
"""(dtype, shape, digest of the bytes) by name."""


def write_bfloat16(
    write: Callable[[bytes | memoryview], None],
    shapes: Mapping[str, tuple[int, ...]],
    slices: Callable[[str], Iterable[memoryview]],
) -> TensorDigests:
    """Writes a whole file; `slices(name)` gives a tensor's bytes in order, in pieces of any size."""
    write(bfloat16_header(shapes))
    digests: TensorDigests = {}
    for name, shape in shapes.items():
        digest, size = hashlib.sha256(), 0
        for piece in slices(name):
            digest.update(piece)
            size += piece.nbytes
            write(piece)
        if size != 2 * math.prod(shape):
            raise AssertionError(f"{name} of shape {shape} was given {size} bytes")
        digests[name] = ("BF16", shape, f"sha256:{digest.hexdigest()}")
    return digests


def hash_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str, int]]:
    """Name, digest and bytes of each tensor's data, as the file has it."""
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            digest, left = hashlib.sha256(), tensor.size
            file.seek(tensor.offset)
            while left:
                piece = file.read(min(left, 1 << 20))
                if not piece:
                    raise _corrupt(path, f"it ends within the tensor {name[:100]!r}")
                digest.update(piece)
                left -= len(piece)
            yield name, f"sha256:{digest.hexdigest()}", tensor.size
