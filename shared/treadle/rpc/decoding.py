"""Bytes to a request, or to the reason why they are none.

grpc.aio ends a call as UNKNOWN, before servicer and interceptors, when a deserialiser raises. So a
deserialiser gives back `Refused` instead, whose error is raised where it can become a status.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from treadle.errors import InvalidArgument, TreadleError
from treadle.rpc.wire_bounds import check_wire

logger = logging.getLogger(__name__)


class Refused:
    """Stands where a request would, had it been fit to be decoded."""

    def __init__(self, error: TreadleError) -> None:
        self.error = error


def decode(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    """The request, or Refused; `deserialize` is a message class's FromString, or any other function."""
    descriptor = getattr(getattr(deserialize, "__self__", None), "DESCRIPTOR", None)
    try:
        if descriptor is not None:
            check_wire(data, descriptor)
        return deserialize(data)
    except TreadleError as error:
        return Refused(error)
    except Exception:
        logger.info("a message could not be decoded", exc_info=True)
        return Refused(
            InvalidArgument(
                "the message cannot be decoded; send the message that the contract names, with valid UTF-8",
                reason="MALFORMED_MESSAGE",
            )
        )
