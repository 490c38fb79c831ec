"""One client's hold on a request: put into its lane, followed, given up when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.errors import Internal, TreadleError
from treadle.queue import control
from treadle.queue.keys import RequestKeys
from treadle.queue.log import QUEUED
from treadle.queue.submission import submit
from treadle_gateway.admission import Slot
from treadle_gateway.background import BackgroundTasks
from treadle_gateway.deadlines import Deadline, out_of_time
from treadle_gateway.disconnects import abandon, client_gone
from treadle_gateway.log_follower import LogFollower
from treadle_gateway.lookup import is_queued
from treadle_gateway.observation import Observation
from treadle_gateway.subscriptions import Subscription

logger = logging.getLogger(__name__)


class Queue:
    """The gateway's ways to Redis: commands, the follower of logs, the tasks that outlive a call."""

    def __init__(
        self,
        redis: Redis,
        follower: LogFollower,
        background: BackgroundTasks,
        gateway_id: str,
        *,
        lane_limit: int,
    ) -> None:
        self.redis = redis
        self.follower = follower
        self.background = background
        self.gateway_id = gateway_id
        self.lane_limit = lane_limit


class Hold:
    """A request from its preparation to its end; `leave` is safe at any time."""

    def __init__(
        self,
        queue: Queue,
        request: RequestKeys,
        deadline: Deadline,
        slot: Slot,
        observation: Observation,
        *,
        payload_digest: str,
        is_retry: bool,
        detaches: bool = False,
    ) -> None:
        """`is_retry`: whether the request may have been queued before, its id being the client's own."""
        self.request = request
        self._queue = queue
        self._deadline = deadline
        self._slot = slot
        self._observed = observation
        self._payload_digest = payload_digest
        self._is_retry = is_retry
        self._detaches = detaches
        self._subscription: Subscription | None = None
        self._submission: asyncio.Task[bool] | None = None
        self._ended = False
        """Whether the request's end was seen: then there is nothing to give up."""
        self._left = False
        self._error: TreadleError | None = None

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The time in which the client waits; it leaves at the block's end."""
        try:
            self._observed.begin()
            yield
        except Exception as error:
            self._error = error if isinstance(error, TreadleError) else Internal("the gateway failed")
            raise
        finally:
            self.leave()

    async def _enter(self, prepare: Callable[[], Awaitable[LaneEntry]]) -> Subscription:
        """Puts the request into its lane, unless it is there; what follows its log from the beginning.

        `prepare` makes the entry; a retry must find its answer whatever has become of model, registry and
        tokenizer since, so it is not called for one.
        """
        entry = None if await self._is_there() else await prepare()
        self._observed.prepared(entry)
        queue = self._queue
        # A log that is new holds nothing yet, and whatever is written to it will be said.
        self._subscription = subscription = queue.follower.subscribe(self.request, QUEUED, news=False)
        # A task of its own: cut short between two writes, it would be unknown whether it is queued.
        self._submission = queue.background.start(self._submit(entry), "submit")
        if not await self._deadline.bound(asyncio.shield(self._submission)):
            subscription.mark()
        return subscription

    async def _is_there(self) -> bool:
        """Whether the request was queued before, and only its answer is wanted."""
        if not self._is_retry:
            return False
        looking = is_queued(self._queue.redis, self.request, self._payload_digest)
        return await self._deadline.bound(looking)

    async def _submit(self, entry: LaneEntry | None) -> bool:
        """Puts the request into its lane; False where it was there before."""
        queue = self._queue
        attached_ms = queue.follower.attached_ms
        new = entry is not None and await submit(
            queue.redis, entry, lane_limit=queue.lane_limit, attached_ms=attached_ms
        )
        if not new:
            await control.watch(queue.redis, self.request, queue.gateway_id, attached_ms=attached_ms)
        logger.info(
            "queued" if new else "joined a request that was queued before",
            extra={
                "request_id": self.request.request_id,
                "tenant": self.request.tenant,
                "prompt_tokens": None if entry is None else prompt_tokens(entry),
            },
        )
        return new

    def leave(self) -> None:
        """The client has its answer, or is gone: then the request is cancelled, unless it detaches."""
        if self._left:
            return
        self._left = True
        self._slot.release()
        queue = self._queue
        given_up = out_of_time() if self._deadline.passed else client_gone()
        self._observed.end(self._error or given_up)
        if self._subscription is not None:
            queue.follower.unsubscribe(self._subscription)
        # A gateway that leaves has not lost its clients: they attach again through another one.
        if self._ended or self._submission is None or self._detaches or queue.follower.leaving:
            return
        queue.background.start(
            abandon(
                queue.redis,
                self.request,
                queue.gateway_id,
                self._submission,
                lambda: queue.follower.follows(self.request),
                given_up,
            ),
            "abandon",
        )


def prompt_tokens(entry: LaneEntry) -> int:
    """How many tokens a worker has to read for it."""
    return len(entry.prompt_token_ids) + sum(len(one.token_ids) for one in entry.task.inputs)
