"""Cursors: where in a request's log a client has got to, as an opaque string.

URL-safe base64, without padding, of: version (1 byte), epoch and number of the last entry and the index of
the next token (8 bytes each, big-endian), and 8 bytes of a BLAKE2b digest over these and the request. The
digest is no secret: it tells a mangled cursor, or another request's, from a good one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass

from treadle.errors import InvalidArgument, invalid_field
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, EntryId

_BODY = struct.Struct(">BQQQ")
_VERSION = 1
_DIGEST_BYTES = 8
_LENGTH = -(-(_BODY.size + _DIGEST_BYTES) * 4 // 3)


@dataclass(frozen=True, slots=True)
class Cursor:
    """After which entry to go on, and the index of the token that comes next."""

    last: EntryId = START
    next_index: int = 0

    def encode(self, request: RequestKeys) -> str:
        """The opaque string."""
        body = _BODY.pack(_VERSION, *self.last, self.next_index)
        return _text(body + _digest(body, request))

    @classmethod
    def decode(cls, text: str, request: RequestKeys) -> Cursor:
        """The cursor of a string that `encode` made; empty: the beginning.

        Raises InvalidArgument for anything else, and for another request's cursor.
        """
        if not text:
            return cls()
        if len(text) != _LENGTH or not text.isascii():
            raise _not_a_cursor()
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except binascii.Error as error:
            raise _not_a_cursor() from error
        body, digest = data[: _BODY.size], data[_BODY.size :]
        # The library reads "+" and "/" as well as the letters that stand for them here.
        if _text(data) != text or body[:1] != bytes([_VERSION]) or digest != _digest(body, request):
            raise _not_a_cursor()
        _, epoch, number, next_index = _BODY.unpack(body)
        return cls(EntryId(epoch, number), next_index)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _digest(body: bytes, request: RequestKeys) -> bytes:
    return hashlib.blake2b(body + request.tag.encode(), digest_size=_DIGEST_BYTES).digest()


def _not_a_cursor() -> InvalidArgument:
    return invalid_field(
        "cursor",
        "is no cursor of this request; send the cursor of the last chunk as it came, or none for all of it",
    )
