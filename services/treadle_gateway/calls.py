"""What the servicers need of a call of grpc.aio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

Context = grpc.aio.ServicerContext[Any, Any]


def when_over(context: Context, leave: Callable[[], None]) -> None:
    """Calls `leave` when the call is over: a handler that waits for a slow client is not told of its end."""

    def done(_: object) -> None:
        leave()

    callback: Any = done
    context.add_done_callback(callback)
