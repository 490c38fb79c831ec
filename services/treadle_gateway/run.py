"""One client's hold on a generation: submitted, followed to its end, given up when the client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from redis.asyncio import Redis

from treadle.api.inference.v1.generation_pb2 import Finished
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.errors import Internal, TreadleError
from treadle.queue import control
from treadle.queue.keys import RequestKeys
from treadle.queue.log import QUEUED
from treadle.queue.submission import submit
from treadle_gateway.admission import Slot
from treadle_gateway.background import BackgroundTasks
from treadle_gateway.convert import from_status
from treadle_gateway.cursor import Cursor
from treadle_gateway.deadlines import Deadline, out_of_time
from treadle_gateway.disconnects import abandon, client_gone
from treadle_gateway.generation import Generation
from treadle_gateway.log_follower import LogFollower
from treadle_gateway.lookup import is_queued
from treadle_gateway.observation import Observation
from treadle_gateway.preparation import Preparation
from treadle_gateway.subscriptions import Subscription
from treadle_gateway.token_stream import Chunk, Failed, follow

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


class Run:
    """A generation from its preparation to its last chunk; `leave` is safe at any time."""

    def __init__(
        self,
        queue: Queue,
        preparation: Preparation,
        generation: Generation,
        request: RequestKeys,
        deadline: Deadline,
        slot: Slot,
        observation: Observation,
    ) -> None:
        self.request = request
        self._queue = queue
        self._preparation = preparation
        self._generation = generation
        self._deadline = deadline
        self._slot = slot
        self._observation = observation
        self._subscription: Subscription | None = None
        self._submission: asyncio.Task[bool] | None = None
        self._ended = False
        self._left = False
        self._error: TreadleError | None = None

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The whole answer; raises what the request ended with, and DeadlineExceeded."""
        try:
            self._observation.begin()
            entry = await self._prepare()
            self._observation.prepared(entry)
            # A log that is new holds nothing yet, and whatever is written to it will be said.
            self._subscription = subscription = self._queue.follower.subscribe(
                self.request, QUEUED, news=False
            )
            # A task of its own: cut short between two writes, it would be unknown whether it is queued.
            self._submission = self._queue.background.start(self._submit(entry), "submit")
            if not await self._deadline.bound(asyncio.shield(self._submission)):
                subscription.mark()
            async for chunk in follow(subscription, Cursor(), self._deadline):
                if isinstance(chunk, Failed):
                    self._ended = True
                    raise from_status(chunk.status)
                self._ended = isinstance(chunk.body, Finished)
                self._observation.chunk(chunk)
                yield chunk
        except Exception as error:
            self._error = error if isinstance(error, TreadleError) else Internal("the gateway failed")
            raise
        finally:
            self.leave()

    async def _prepare(self) -> LaneEntry | None:
        """The entry to queue; None where the request was queued before, and only its answer is wanted."""
        generation = self._generation
        # A retry must find its answer whatever has become of model, registry and tokenizer since.
        if generation.request_id:
            looking = is_queued(self._queue.redis, self.request, generation.payload_digest)
            if await self._deadline.bound(looking):
                return None
        traceparent = self._observation.span.traceparent
        return await self._preparation.prepare(generation, self.request, self._deadline, traceparent)

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
                "prompt_tokens": len(entry.prompt_token_ids) if entry is not None else None,
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
        self._observation.end(self._error or given_up)
        if self._subscription is not None:
            queue.follower.unsubscribe(self._subscription)
        # A gateway that leaves has not lost its clients: they attach again through another one.
        if self._ended or self._submission is None or self._generation.detaches or queue.follower.leaving:
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
