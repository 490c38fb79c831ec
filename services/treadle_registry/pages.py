"""Pages of lists (AIP-158): sizes with a ceiling, and opaque tokens that fit only the list they came from."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import TypeVar

from treadle.errors import InvalidArgument, invalid_field

_T = TypeVar("_T")

_DEFAULT_SIZE = 50
_MAX_SIZE = 500
_MAX_TOKEN = 1024
"""Names are shorter; what is longer was not made here, and is not parsed."""
LAST = 1 << 62
"""Above every number of a row: where a list from the newest on begins."""


def page_size(asked: int) -> int:
    """How many to give; 0 asks for the default, and more than the ceiling is the ceiling."""
    if asked < 0:
        raise invalid_field("page_size", f"must not be negative; got {asked}")
    return min(asked or _DEFAULT_SIZE, _MAX_SIZE)


def next_token(listing: str, key: str | int) -> str:
    """The token that goes on after the row `key` of a listing."""
    return base64.urlsafe_b64encode(json.dumps([listing, key]).encode()).decode()


def page_of(rows: list[_T], limit: int, listing: str, key: Callable[[_T], str | int]) -> tuple[list[_T], str]:
    """The first `limit` of one row more, and the token that leads on when that one was there."""
    page = rows[:limit]
    return page, next_token(listing, key(page[-1])) if len(rows) > limit else ""


def read_token(token: str, listing: str, first: str | int) -> str | int:
    """The key to go on after; `first` where there is no token. Raises InvalidArgument for a foreign token."""
    if not token:
        return first
    if len(token) > _MAX_TOKEN:
        raise _foreign()
    try:
        value = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        found, key = value if isinstance(value, list) else (None, None)
    except (ValueError, binascii.Error, TypeError, RecursionError):
        raise _foreign() from None
    if found != listing or not _is_key(key, first):
        raise _foreign()
    assert isinstance(key, str | int)
    return key


def _is_key(key: object, first: str | int) -> bool:
    """Whether it can be the key of a row: names and digests are ASCII, numbers of rows SQLite's."""
    if isinstance(first, str):
        return isinstance(key, str) and key.isascii()
    return type(key) is int and 0 <= key <= LAST


def _foreign() -> InvalidArgument:
    return invalid_field("page_token", "is no token of this list; begin again without one")
