"""Items of a stream of requests: one that is no message is the end of the item, and not of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from treadle.errors import TreadleError
from treadle.rpc.decoding import Refused, decode

M = TypeVar("M", bound=Message)


class Undecodable:
    """Stands in a stream for a message that is none."""

    def __init__(self, error: TreadleError) -> None:
        self.error = error


def item_decoder(kind: type[M]) -> Callable[[bytes], M | Undecodable]:
    """The deserialiser of a stream's items."""

    def decode_item(data: bytes) -> M | Undecodable:
        item: Any = decode(kind.FromString, data)
        return Undecodable(item.error) if isinstance(item, Refused) else item

    return decode_item


def decoded(item: M | Undecodable) -> M:
    """The message; raises why it is none."""
    if isinstance(item, Undecodable):
        raise item.error
    return item
