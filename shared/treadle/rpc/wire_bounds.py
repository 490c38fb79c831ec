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

    def walk(self, descriptor: Descriptor) -> None:
        waiting = [(0, len(self._data), descriptor, "")]
        while waiting:
            at, end, kind, path = waiting.pop()
            fields = _fields(kind)
            while at < end:
                tag, at = self._varint(at)
                field = fields.get(tag >> 3)
                name = path if field is None else f"{path}.{field.name}"
                self._elements += 1
                if self._elements > MAX_ELEMENTS:
                    raise _too_many(name, MAX_ELEMENTS, "parts")
                start, at = self._skip(tag & 7, at)
                if at > end:
                    raise _Malformed
                if field is None or tag & 7 != _LENGTH:
                    continue
                if field.message is not None:
                    if path.count(".") < _MAX_DEPTH:
                        waiting.append((start, at, field.message, name))
                elif field.number_width is not None:
                    self._count_numbers(field.number_width, start, at, name)

    def _count_numbers(self, width: int, start: int, end: int, name: str) -> None:
        packed = self._data[start:end]
        self._numbers += len(packed) // width if width else len(packed.translate(None, _NOT_LAST))
        if self._numbers > MAX_NUMBERS:
            raise _too_many(name, MAX_NUMBERS, "numbers")

    def _skip(self, wire_type: int, at: int) -> tuple[int, int]:
        """Where a field's content begins and ends."""
        if wire_type == _VARINT:
            return at, self._varint(at)[1]
        if wire_type == _LENGTH:
            length, at = self._varint(at)
            return at, at + length
        if wire_type in (_FIXED64, _FIXED32):
            return at, at + (8 if wire_type == _FIXED64 else 4)
        if wire_type in (_START_GROUP, _END_GROUP):
            return at, at
        raise _Malformed

    def _varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        for place in range(at, min(at + 10, len(self._data))):
            byte = self._data[place]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place + 1
            shift += 7
        raise _Malformed


def _too_many(path: str, most: int, what: str) -> InvalidArgument:
    description = f"the message has more than {most} {what} up to here; send fewer, in several requests"
    if not path:
        return InvalidArgument(description, reason=REASON)
    return invalid_field(path.removeprefix("."), description, reason=REASON)
