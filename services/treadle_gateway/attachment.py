"""A client that picks up a request's chunks, from any gateway, where it or another had left them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from treadle.errors import OutOfRange
from treadle.queue import control
from treadle.queue.keys import RequestKeys
from treadle_gateway.admission import Slot
from treadle_gateway.convert import from_status
from treadle_gateway.cursor import Cursor
from treadle_gateway.deadlines import Deadline
from treadle_gateway.hold import Queue
from treadle_gateway.lookup import log_state
from treadle_gateway.subscriptions import Subscription
from treadle_gateway.token_stream import Chunk, Failed, follow


class Attachment:
    """Follows a request that was submitted before; `leave` is safe at any time."""

    def __init__(
        self, queue: Queue, request: RequestKeys, cursor: Cursor, deadline: Deadline, slot: Slot
    ) -> None:
        self.request = request
        self._queue = queue
        self._cursor = cursor
        self._deadline = deadline
        self._slot = slot
        self._subscription: Subscription | None = None

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The chunks after the cursor; none where the cursor is the answer's end.

        Raises NotFound for an unknown request, OutOfRange for a cursor beyond what was written, and what
        the request ended with.
        """
        queue = self._queue
        try:
            state = await self._deadline.bound(log_state(queue.redis, self.request, self._cursor.last))
            if self._cursor.last > state.top:
                raise OutOfRange(
                    "cursor: is beyond what was written, which Redis may have lost; attach without one",
                    reason="CURSOR_BEYOND_END",
                )
            if state.ended_at:
                return
            self._subscription = subscription = queue.follower.subscribe(self.request, self._cursor.last)
            watching = control.watch(
                queue.redis, self.request, queue.gateway_id, attached_ms=queue.follower.attached_ms
            )
            await self._deadline.bound(watching)
            async for chunk in follow(subscription, self._cursor, self._deadline):
                if isinstance(chunk, Failed):
                    raise from_status(chunk.status)
                yield chunk
        finally:
            self.leave()

    def leave(self) -> None:
        """The client has what it wanted, or is gone. The request goes on: where it is to be cancelled with
        its last client, the `attached` key that nobody renews any more says so to its worker."""
        self._slot.release()
        if self._subscription is not None:
            self._queue.follower.unsubscribe(self._subscription)
            self._subscription = None
