"""A generation: submitted, followed to its last chunk."""

from __future__ import annotations

from collections.abc import AsyncIterator

from treadle.api.inference.v1.generation_pb2 import Finished
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.queue.keys import RequestKeys
from treadle_gateway.admission import Slot
from treadle_gateway.convert import from_status
from treadle_gateway.cursor import Cursor
from treadle_gateway.deadlines import Deadline
from treadle_gateway.generation import Generation
from treadle_gateway.hold import Hold, Queue
from treadle_gateway.observation import GenerationObservation
from treadle_gateway.preparation import Preparation
from treadle_gateway.token_stream import Chunk, Failed, follow


class Run(Hold):
    """A generation from its preparation to its last chunk; `leave` is safe at any time."""

    def __init__(
        self,
        queue: Queue,
        preparation: Preparation,
        generation: Generation,
        request: RequestKeys,
        deadline: Deadline,
        slot: Slot,
        observation: GenerationObservation,
    ) -> None:
        super().__init__(
            queue,
            request,
            deadline,
            slot,
            observation,
            payload_digest=generation.payload_digest,
            is_retry=bool(generation.request_id),
            detaches=generation.detaches,
        )
        self._preparation = preparation
        self._generation = generation
        self._observation = observation

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The whole answer; raises what the request ended with, and DeadlineExceeded."""
        with self._held():
            subscription = await self._enter(self._prepare)
            async for chunk in follow(subscription, Cursor(), self._deadline):
                if isinstance(chunk, Failed):
                    self._ended = True
                    raise from_status(chunk.status)
                self._ended = isinstance(chunk.body, Finished)
                self._observation.chunk(chunk)
                yield chunk

    async def _prepare(self) -> LaneEntry:
        traceparent = self._observation.span.traceparent
        return await self._preparation.prepare(self._generation, self.request, self._deadline, traceparent)
