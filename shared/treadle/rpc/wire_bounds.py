"""How many parts a message may have, counted on the wire before any of it is made an object.

Fifteen megabytes can be seven million empty submessages: as objects they take a gigabyte and ten seconds of
the event loop. https://protobuf.dev/programming-guides/encoding/ is the format.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from treadle.errors import InvalidArgument, invalid_field

MAX_ELEMENTS = 1 << 16
"""Fields of a message in all, those of its submessages included; a list's elements count each."""
MAX_NUMBERS = 1 << 21
"""Elements of packed lists of numbers, in all."""
REASON = "TOO_MANY_ELEMENTS"

_VARINT, _FIXED64, _LENGTH, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_MAX_DEPTH = 100
_NOT_LAST = bytes(range(0x80, 0x100))
"""The bytes after which a varint goes on."""
_WIDTHS = {
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
}
_UNPACKED = frozenset({FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE})


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    message: Descriptor | None
    number_width: int | None
    """Of a number in a packed list, in bytes; 0: varints; None: it is none."""


@functools.cache
def _fields(descriptor: Descriptor) -> dict[int, _Field]:
    return {
        field.number: _Field(
            field.name,
            field.message_type,
            None if field.type in _UNPACKED else _WIDTHS.get(field.type, 0),
        )
        for field in descriptor.fields
    }


class _Malformed(Exception):
    """No message; whoever decodes it will say so."""


def check_wire(data: bytes, descriptor: Descriptor) -> None:
    """Raises InvalidArgument (TOO_MANY_ELEMENTS), naming the field, for a message of too many parts.

    Takes about a microsecond a part, and nothing for messages too small to have too many.
    """
    if len(data) > 2 * MAX_ELEMENTS:
        try:
            _Count(data).walk(descriptor)
        except _Malformed:
            return


class _Count:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._elements = 0
        self._numbers = 0
        self._waiting: list[tuple[int, int, Descriptor, str]] = []

    def walk(self, descriptor: Descriptor) -> None:
        self._waiting.append((0, len(self._data), descriptor, ""))
        while self._waiting:
            self._walk_one(*self._waiting.pop())

    def _walk_one(self, at: int, end: int, kind: Descriptor, path: str) -> None:
        """One message's fields. Called for each submessage, so its loop calls nothing that it need not."""
        data, fields, paths = self._data, _fields(kind), _paths(kind, path)
        while at < end:
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = _varint(data, at - 1)
            self._elements += 1
            if self._elements > MAX_ELEMENTS:
                raise _too_many(paths.get(tag >> 3, path), MAX_ELEMENTS, "parts")
            wire_type = tag & 7
            if wire_type != _LENGTH:
                at = _skipped(data, wire_type, at)
                continue
            length, at = _varint(data, at)
            start, at = at, at + length
            if at > end:
                raise _Malformed
            field = fields.get(tag >> 3)
            if field is None:
                continue
            if field.message is not None:
                if length and path.count(".") < _MAX_DEPTH:
                    self._waiting.append((start, at, field.message, paths[tag >> 3]))
            elif field.number_width is not None:
                self._count_numbers(field.number_width, start, at, paths[tag >> 3])

    def _count_numbers(self, width: int, start: int, end: int, path: str) -> None:
        packed = self._data[start:end]
        self._numbers += len(packed) // width if width else len(packed.translate(None, _NOT_LAST))
        if self._numbers > MAX_NUMBERS:
            raise _too_many(path, MAX_NUMBERS, "numbers")


@functools.lru_cache(maxsize=1024)
def _paths(kind: Descriptor, path: str) -> dict[int, str]:
    return {number: f"{path}.{field.name}" for number, field in _fields(kind).items()}


def _skipped(data: bytes, wire_type: int, at: int) -> int:
    """Where a field that is no list of bytes ends."""
    if wire_type == _VARINT:
        return _varint(data, at)[1]
    if wire_type in (_FIXED64, _FIXED32):
        return at + (8 if wire_type == _FIXED64 else 4)
    if wire_type in (_START_GROUP, _END_GROUP):
        return at
    raise _Malformed


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed


def _too_many(path: str, most: int, what: str) -> InvalidArgument:
    description = f"the message has more than {most} {what} up to here; send fewer, in several requests"
    if not path:
        return InvalidArgument(description, reason=REASON)
    return invalid_field(path.removeprefix("."), description, reason=REASON)
