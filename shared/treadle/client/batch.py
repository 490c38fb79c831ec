"""Many requests on one stream, and only the unanswered ones again when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable

import grpc

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.client.answer import BatchItem
from treadle.client.convert import answer_from_proto
from treadle.client.reconnect import Reconnects
from treadle.client.request import GenerationRequest
from treadle.errors import DataLoss, invalid_field
from treadle.rpc import from_status

BatchCall = grpc.aio.StreamStreamCall[inference_pb2.BatchGenerateRequest, inference_pb2.BatchGenerateResponse]

Requests = Iterable[GenerationRequest] | AsyncIterable[GenerationRequest]


class Batch:
    """Sends requests as answers make room for them, and yields each outcome when it is ready."""

    def __init__(
        self,
        requests: Requests,
        to_proto: Callable[[GenerationRequest], generation_pb2.Generation],
        open_call: Callable[[AsyncIterator[inference_pb2.BatchGenerateRequest], float], BatchCall],
        reconnects: Reconnects,
        window: int,
    ) -> None:
        """At most `window` requests wait for their answers at a time."""
        self._source = _iterate(requests)
        self._to_proto = to_proto
        self._open_call = open_call
        self._reconnects = reconnects
        self._room = asyncio.Semaphore(window)
        self._waiting: dict[str, tuple[int, generation_pb2.Generation]] = {}
        self._taken = 0
        self._exhausted = False
        self._source_error: Exception | None = None
        self._pulling: asyncio.Task[generation_pb2.Generation | None] | None = None

    async def outcomes(self) -> AsyncGenerator[BatchItem, None]:
        """Each request's outcome once, in the order in which they become ready.

        Raises what the requests' iterator raised, and the error of the stream itself.
        """
        try:
            while self._waiting or not self._exhausted:
                call = self._open_call(self._sending(), self._reconnects.left_s())
                try:
                    async for response in call:
                        self._reconnects.progress()
                        if (item := self._take(response)) is not None:
                            yield item
                except grpc.aio.AioRpcError as error:
                    if self._source_error is None:
                        await self._reconnects.pause(error)
                        continue
                finally:
                    call.cancel()
                if self._source_error is not None:
                    raise self._source_error
                if self._waiting or not self._exhausted:
                    raise DataLoss(
                        f"the stream ended with {len(self._waiting)} requests unanswered",
                        reason="STREAM_INCOMPLETE",
                    )
        finally:
            if self._pulling is not None:
                self._pulling.cancel()
                await asyncio.gather(self._pulling, return_exceptions=True)
            await self._source.aclose()

    async def _sending(self) -> AsyncIterator[inference_pb2.BatchGenerateRequest]:
        """What one call sends: the requests that still wait, then new ones."""
        sent: set[str] = set()
        for _, waiting in list(self._waiting.values()):
            sent.add(waiting.request_id)
            yield inference_pb2.BatchGenerateRequest(generation=waiting)
        while not self._exhausted:
            # A lost call cancels this iterator: the requests' own must not notice, or it would end.
            self._pulling = self._pulling or asyncio.create_task(self._pull())
            generation = await asyncio.shield(self._pulling)
            self._pulling = None
            if generation is not None and generation.request_id not in sent:
                yield inference_pb2.BatchGenerateRequest(generation=generation)

    async def _pull(self) -> generation_pb2.Generation | None:
        """The next request, once there is room for it; None at the end or at an error."""
        await self._room.acquire()
        try:
            generation = self._to_proto(await self._source.__anext__())
            if generation.request_id in self._waiting:
                raise invalid_field(
                    f"requests[{self._taken}].request_id",
                    f"is in the batch already: {generation.request_id!r}; ids are unique",
                )
        except StopAsyncIteration:
            self._exhausted = True
            return None
        except Exception as error:
            self._exhausted = True
            self._source_error = error
            return None
        self._waiting[generation.request_id] = (self._taken, generation)
        self._taken += 1
        return generation

    def _take(self, response: inference_pb2.BatchGenerateResponse) -> BatchItem | None:
        place = self._waiting.pop(response.request_id, None)
        if place is None:  # answered before the connection broke, and sent again
            return None
        self._room.release()
        if response.HasField("error"):
            return BatchItem(place[0], response.request_id, None, from_status(response.error))
        return BatchItem(place[0], response.request_id, answer_from_proto(response.response), None)


async def _iterate(requests: Requests) -> AsyncGenerator[GenerationRequest, None]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
