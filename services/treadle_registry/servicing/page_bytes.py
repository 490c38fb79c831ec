"""Pages of lists that every client can receive, however large their items are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf.message import Message

from treadle_registry.pages import next_token

MOST_BYTES = 2 << 20
"""Of a page with more than one item; gRPC's clients take twice that where nobody has set another bound."""

_Row = TypeVar("_Row")
_Item = TypeVar("_Item", bound=Message)


def page_in_bytes(
    rows: Iterable[_Row],
    token: str,
    listing: str,
    key: Callable[[_Row], str | int],
    convert: Callable[[_Row], _Item],
) -> tuple[list[_Item], str]:
    """The messages of a page's first rows, and the token that leads on; `token` where all of them fit."""
    items: list[_Item] = []
    size, last = 0, None
    for row in rows:
        item = convert(row)
        size += item.ByteSize()
        if last is not None and size > MOST_BYTES:
            return items, next_token(listing, key(last))
        items.append(item)
        last = row
    return items, token
