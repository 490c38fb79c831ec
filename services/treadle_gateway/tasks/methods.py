"""The tasks' methods of InferenceService: each alone, and many on one stream with their answers in order."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from treadle.api.inference.v1 import inference_pb2 as pb
from treadle.errors import TreadleError
from treadle.rpc import to_status
from treadle.security import Principal, current_principal
from treadle_gateway.batch import Batch
from treadle_gateway.calls import Context, when_over
from treadle_gateway.stream_items import Undecodable, decoded, item_decoder
from treadle_gateway.tasks import convert
from treadle_gateway.tasks.task import Task
from treadle_gateway.tasks.tasks import Tasks
from treadle_gateway.tasks.work import TaskAnswer

logger = logging.getLogger(__name__)


Asked = TypeVar("Asked")
Answered = TypeVar("Answered", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[Asked, Answered]):
    """One task's messages: those of its stream, and its own to plain Python and back."""

    item: Any
    answer: Any
    to_task: Callable[[Asked, Principal], Task]
    to_response: Callable[[TaskAnswer], Answered]


EMBED = Method(pb.EmbedStreamRequest, pb.EmbedStreamResponse, convert.to_embed, convert.to_embed_response)
CLASSIFY = Method(
    pb.ClassifyStreamRequest, pb.ClassifyStreamResponse, convert.to_classify, convert.to_classify_response
)
TAG = Method(pb.TagStreamRequest, pb.TagStreamResponse, convert.to_tag, convert.to_tag_response)
RERANK = Method(
    pb.RerankStreamRequest, pb.RerankStreamResponse, convert.to_rerank, convert.to_rerank_response
)
SCORE = Method(pb.ScoreStreamRequest, pb.ScoreStreamResponse, convert.to_score, convert.to_score_response)


class TaskMethods:
    """A part of InferenceServicer."""

    def __init__(self, tasks: Tasks, *, max_batch_in_flight: int) -> None:
        self._tasks = tasks
        self._max_in_flight = max_batch_in_flight

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """One vector a text."""
        return await self._alone(EMBED, request, context)

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:  # noqa: N802
        """Labels of texts and pairs."""
        return await self._alone(CLASSIFY, request, context)

    async def Tag(self, request: pb.TagRequest, context: Context) -> pb.TagResponse:  # noqa: N802
        """Spans of texts."""
        return await self._alone(TAG, request, context)

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResponse:  # noqa: N802
        """Documents, best first."""
        return await self._alone(RERANK, request, context)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # noqa: N802
        """Log-probabilities of continuations."""
        return await self._alone(SCORE, request, context)

    async def EmbedStream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.EmbedStreamRequest | Undecodable], context: Context
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        """Many of Embed."""
        async for response in self._stream(EMBED, request_iterator, context):
            yield response

    async def ClassifyStream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ClassifyStreamRequest | Undecodable], context: Context
    ) -> AsyncIterator[pb.ClassifyStreamResponse]:
        """Many of Classify."""
        async for response in self._stream(CLASSIFY, request_iterator, context):
            yield response

    async def TagStream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.TagStreamRequest | Undecodable], context: Context
    ) -> AsyncIterator[pb.TagStreamResponse]:
        """Many of Tag."""
        async for response in self._stream(TAG, request_iterator, context):
            yield response

    async def RerankStream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.RerankStreamRequest | Undecodable], context: Context
    ) -> AsyncIterator[pb.RerankStreamResponse]:
        """Many of Rerank."""
        async for response in self._stream(RERANK, request_iterator, context):
            yield response

    async def ScoreStream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ScoreStreamRequest | Undecodable], context: Context
    ) -> AsyncIterator[pb.ScoreStreamResponse]:
        """Many of Score."""
        async for response in self._stream(SCORE, request_iterator, context):
            yield response

    async def _alone(self, method: Method[Asked, Answered], request: Asked, context: Context) -> Answered:
        run = self._tasks.run(method.to_task(request, current_principal()), context.time_remaining())
        when_over(context, run.leave)
        return await run.answer(method.to_response)

    async def _stream(
        self, method: Method[Any, Any], items: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        async def answer(index: int, item: Any) -> Any:
            return await self._item(method, context, index, item)

        batch = Batch(aiter(items), answer, limit=self._max_in_flight, ordered=True)
        when_over(context, batch.close)
        async for response in batch.answers():
            yield response

    async def _item(self, method: Method[Any, Any], context: Context, index: int, item: Any) -> Any:
        """An item's answer; whatever is wrong with it is wrong with it alone."""
        request_id = "" if isinstance(item, Undecodable) else item.request.context.request_id
        try:
            task = method.to_task(decoded(item).request, current_principal())
            run = self._tasks.run(task, context.time_remaining())
            request_id = run.request.request_id
            response = await run.answer(method.to_response)
            return method.answer(index=index, request_id=request_id, response=response)
        except Exception as error:
            if not isinstance(error, TreadleError):
                logger.exception("an item of a stream failed", extra={"request_id": request_id})
            return method.answer(index=index, request_id=request_id, error=to_status(error))

    def stream_handlers(self) -> Mapping[str, Any]:
        """The streams' handlers, which are handed an item that is no message, too."""
        streams: dict[str, tuple[Method[Any, Any], Any]] = {
            "EmbedStream": (EMBED, self.EmbedStream),
            "ClassifyStream": (CLASSIFY, self.ClassifyStream),
            "TagStream": (TAG, self.TagStream),
            "RerankStream": (RERANK, self.RerankStream),
            "ScoreStream": (SCORE, self.ScoreStream),
        }
        return {
            name: grpc.stream_stream_rpc_method_handler(
                handler,
                request_deserializer=item_decoder(method.item),
                response_serializer=method.answer.SerializeToString,
            )
            for name, (method, handler) in streams.items()
        }
