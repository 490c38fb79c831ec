"""Many requests on one stream, and only the unanswered ones again when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc
from google.rpc import status_pb2

from treadle.client.answer import BatchItem
from treadle.client.reconnect import Reconnects
from treadle.errors import Cancelled, DataLoss, TreadleError, Unavailable, invalid_field
from treadle.rpc import from_status
from treadle.rpc.channel import MAX_MESSAGE_BYTES

RequestT = TypeVar("RequestT")
SentT = TypeVar("SentT")
ReceivedT = TypeVar("ReceivedT", bound="Received")
AnswerT = TypeVar("AnswerT")

Items = Iterable[RequestT] | AsyncIterable[RequestT]


class Received(Protocol):
    """The contract's answer to one item: BatchGenerateResponse and its likes."""

    @property
    def request_id(self) -> str: ...

    @property
    def error(self) -> status_pb2.Status: ...

    def HasField(self, name: Any, /) -> bool: ...  # noqa: N802


@dataclass(frozen=True, slots=True)
class BatchMethod(Generic[RequestT, SentT, ReceivedT, AnswerT]):
    """How one method of the contract takes requests and gives answers."""

    to_message: Callable[[RequestT], tuple[str, SentT]]
    """The request's id and its message."""
    open_call: Callable[[AsyncIterator[SentT], float], grpc.aio.StreamStreamCall[SentT, ReceivedT]]
    """With what is to be sent, and the seconds that are left."""
    to_answer: Callable[[ReceivedT], AnswerT]
    ordered: bool
    """Whether answers come in the order of the requests."""
    renewed: Callable[[SentT], tuple[str, SentT]] | None = None
    """A message under another id, where one that was cancelled with its call can be asked again; None: it
    cannot."""


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[SentT]):
    """A request without an outcome; one that cannot be sent has its error instead of a message."""

    index: int
    message: SentT | None
    error: TreadleError | None


@dataclass(frozen=True, slots=True)
class _Ended:
    """A call ended, well or with an error."""

    error: Exception | None


_DRAINING = "DRAINING"
_FAILED = object()
"""A request turned out to be one that cannot be sent."""


class Batch(Generic[RequestT, SentT, ReceivedT, AnswerT]):
    """Sends requests as answers make room for them, and yields each outcome when it is ready."""

    def __init__(
        self,
        requests: Items[RequestT],
        method: BatchMethod[RequestT, SentT, ReceivedT, AnswerT],
        reconnects: Reconnects,
        window: int,
    ) -> None:
        """At most `window` requests wait for their answers at a time."""
        if window < 1:
            raise invalid_field("window", f"must be at least 1; got {window}")
        self._source = _iterate(requests)
        self._method = method
        self._reconnects = reconnects
        self._room = asyncio.Semaphore(window)
        self._waiting: dict[str, _Waiting[SentT]] = {}
        # No more than `window` answers lie in it: what was not taken holds its room.
        self._events: asyncio.Queue[ReceivedT | _Ended | object] = asyncio.Queue()
        self._num_failed = 0
        self._resent: set[str] = set()
        self._taken = 0
        self._exhausted = False
        self._source_error: Exception | None = None
        self._pulling: asyncio.Task[tuple[str, SentT] | None] | None = None

    async def outcomes(self) -> AsyncGenerator[BatchItem[AnswerT], None]:
        """Each request's outcome once, as the method orders them.

        Raises what the requests' iterator raised, and the error of the stream itself.
        """
        try:
            while self._waiting or not self._exhausted:
                call = self._method.open_call(self._sending(), self._reconnects.left_s())
                receiving = asyncio.create_task(self._receive(call))
                try:
                    while not isinstance(event := await self._events.get(), _Ended):
                        if event is not _FAILED:
                            received = cast("ReceivedT", event)
                            if (lost := self._lost(received)) is not None:
                                event = _Ended(lost)
                                break
                            self._reconnects.progress()
                            if (item := self._take(received)) is not None:
                                yield item
                        for item in self._failures():
                            yield item
                finally:
                    call.cancel()
                    receiving.cancel()
                    await asyncio.gather(receiving, return_exceptions=True)
                while not self._events.empty():  # of a call that is over
                    self._events.get_nowait()
                for item in self._failures():
                    yield item
                if self._source_error is not None:
                    raise self._source_error
                if isinstance(event.error, grpc.aio.AioRpcError):
                    await self._reconnects.pause(event.error)
                elif isinstance(event.error, Unavailable | Cancelled):
                    await self._reconnects.pause_after(event.error)
                elif event.error is not None:
                    raise event.error
                elif self._waiting or not self._exhausted:
                    raise DataLoss(
                        f"the stream ended with {len(self._waiting)} requests unanswered",
                        reason="STREAM_INCOMPLETE",
                    )
        finally:
            if self._pulling is not None:
                self._pulling.cancel()
                await asyncio.gather(self._pulling, return_exceptions=True)
            await self._source.aclose()

    async def _receive(self, call: grpc.aio.StreamStreamCall[SentT, ReceivedT]) -> None:
        try:
            async for response in call:
                self._events.put_nowait(response)
        except Exception as error:
            self._events.put_nowait(_Ended(error))
        else:
            self._events.put_nowait(_Ended(None))

    async def _sending(self) -> AsyncIterator[SentT]:
        """What one call sends: the requests that still wait, then new ones."""
        sent: set[str] = set()
        for request_id, waiting in list(self._waiting.items()):
            if waiting.message is not None:
                sent.add(request_id)
                self._resent.add(request_id)
                yield waiting.message
        while not self._exhausted:
            # A lost call cancels this iterator: the requests' own must not notice, or it would end.
            self._pulling = self._pulling or asyncio.create_task(self._pull())
            pulled = await asyncio.shield(self._pulling)
            self._pulling = None
            if pulled is not None and pulled[0] not in sent:
                yield pulled[1]

    async def _pull(self) -> tuple[str, SentT] | None:
        """The next request, once there is room for it; None where there is none to send."""
        await self._room.acquire()
        try:
            request = await self._source.__anext__()
        except StopAsyncIteration:
            self._exhausted = True
            return None
        except Exception as error:
            self._exhausted = True
            self._source_error = error
            return None
        index, self._taken = self._taken, self._taken + 1
        try:
            request_id, message = self._method.to_message(request)
            if request_id in self._waiting:
                raise invalid_field(
                    f"requests[{index}].request_id",
                    f"is in the batch already: {request_id!r}; ids are unique",
                )
            _check_size(message)
        except TreadleError as error:
            self._waiting[f"not sent, {index}"] = _Waiting(index, None, error)
            self._num_failed += 1
            self._events.put_nowait(_FAILED)
            return None
        self._waiting[request_id] = _Waiting(index, message, None)
        return request_id, message

    def _lost(self, response: ReceivedT) -> TreadleError | None:
        """An item's error that means that the whole call is to be made again: its gateway stops, or one saw
        the call before it break, and cancelled what ran on that."""
        if not response.HasField("error"):
            return None
        error = from_status(response.error)
        if isinstance(error, Unavailable) and error.reason == _DRAINING:
            return error
        renewed = self._method.renewed
        if isinstance(error, Cancelled) and renewed is not None and response.request_id in self._resent:
            # Whatever else ran on that call is as over as this one.
            self._waiting = dict(self._again(key, waiting, renewed) for key, waiting in self._waiting.items())
            self._resent.clear()
            return error
        return None

    def _again(
        self, key: str, waiting: _Waiting[SentT], renewed: Callable[[SentT], tuple[str, SentT]]
    ) -> tuple[str, _Waiting[SentT]]:
        if key not in self._resent or waiting.message is None:
            return key, waiting
        request_id, message = renewed(waiting.message)
        return request_id, _Waiting(waiting.index, message, None)

    def _take(self, response: ReceivedT) -> BatchItem[AnswerT] | None:
        request_id = response.request_id
        if request_id not in self._waiting:  # answered before the connection broke, and sent again
            return None
        if self._method.ordered and request_id != next(iter(self._waiting)):
            raise DataLoss(
                "the stream's answers are not in the order of its requests", reason="STREAM_OUT_OF_ORDER"
            )
        index = self._waiting.pop(request_id).index
        self._resent.discard(request_id)
        self._room.release()
        if response.HasField("error"):
            return BatchItem(index, request_id, None, from_status(response.error))
        try:
            return BatchItem(index, request_id, self._method.to_answer(response), None)
        except TreadleError as error:
            return BatchItem(index, request_id, None, error)

    def _failures(self) -> Iterator[BatchItem[AnswerT]]:
        """Those that could not be sent, as far as it is their turn."""
        if self._num_failed == 0:
            return
        for key, waiting in list(self._waiting.items()):
            if waiting.error is not None:
                del self._waiting[key]
                self._num_failed -= 1
                self._room.release()
                yield BatchItem(waiting.index, "", None, waiting.error)
            elif self._method.ordered:
                return


def _check_size(message: Any) -> None:
    # gRPC would end the whole stream for it.
    if (size := message.ByteSize()) > MAX_MESSAGE_BYTES:
        raise invalid_field(
            "request", f"has {size} bytes; a message has {MAX_MESSAGE_BYTES} at most: send fewer texts in one"
        )


async def _iterate(requests: Items[RequestT]) -> AsyncGenerator[RequestT, None]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
