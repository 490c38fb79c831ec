"""Vectors, labels, spans, rankings and log-probabilities, asked of a gateway."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeVar, Unpack

import grpc

from treadle.api.inference.v1 import inference_pb2
from treadle.client.answer import BatchItem
from treadle.client.batch import Batch, BatchMethod, Items, ReceivedT
from treadle.client.inference_connection import BATCH_S, InferenceConnection
from treadle.client.reconnect import Reconnects
from treadle.client.task_answer import Classifications, Embeddings, Ranking, Scores, TaggedTexts
from treadle.client.task_convert import (
    classifications_from_proto,
    classify_to_proto,
    context_to_proto,
    embed_to_proto,
    embeddings_from_proto,
    ranking_from_proto,
    rerank_to_proto,
    score_to_proto,
    scores_from_proto,
    tag_to_proto,
    tagged_from_proto,
)
from treadle.client.task_request import (
    ClassifyOptions,
    ClassifyRequest,
    EmbedOptions,
    EmbedRequest,
    RerankOptions,
    RerankRequest,
    Scored,
    ScoreRequest,
    TagOptions,
    TagRequest,
    TaskOptions,
    TaskRequest,
    Text,
    Texts,
)
from treadle.errors import Cancelled, invalid_field
from treadle.rpc import from_rpc_error
from treadle.rpc.status import is_loss

TASK_WINDOW = 64
"""How many requests of a stream wait for their answers at a time, unless it is said."""
_pb = inference_pb2
_ItemT = TypeVar("_ItemT")
_RequestT = TypeVar("_RequestT", bound=TaskRequest)
_SentT = TypeVar("_SentT", bound="_Sent")
_ResponseT = TypeVar("_ResponseT")
_AnswerT = TypeVar("_AnswerT")


class _Message(Protocol):
    @property
    def context(self) -> _pb.TaskContext: ...


class _Sent(Protocol):
    @property
    def request(self) -> _Message: ...


class TaskMethods(InferenceConnection):
    """The tasks beside generation; see AsyncClient.

    Each has a method that answers one request, its texts together, and one that streams: requests in, their
    outcomes out in the same order, at most `window` of them unanswered at a time. A bad request of a stream
    fails alone: its item has the error. A stream that loses its connection goes on with the unanswered
    requests, under their ids. `timeout_s` is one request's; a whole stream has a day. A plain iterable is
    taken on the event loop, so it must not block: what waits is an asynchronous one.
    """

    async def embed(self, texts: Texts, **options: Unpack[EmbedOptions]) -> Embeddings:
        """One vector a text, in one request."""
        request = EmbedRequest(texts=texts, **options)
        message = embed_to_proto(request, self._context(request))
        return embeddings_from_proto(
            await self._asked(request, message, lambda left_s: self._stub.Embed(message, timeout=left_s))
        )

    async def classify(self, texts: Texts, **options: Unpack[ClassifyOptions]) -> Classifications:
        """The labels of each text or pair, in one request."""
        request = ClassifyRequest(texts=texts, **options)
        message = classify_to_proto(request, self._context(request))
        return classifications_from_proto(
            await self._asked(request, message, lambda left_s: self._stub.Classify(message, timeout=left_s))
        )

    async def tag(self, texts: Texts, **options: Unpack[TagOptions]) -> TaggedTexts:
        """The labelled spans of each text, in one request."""
        request = TagRequest(texts=texts, **options)
        message = tag_to_proto(request, self._context(request))
        return tagged_from_proto(
            await self._asked(request, message, lambda left_s: self._stub.Tag(message, timeout=left_s))
        )

    async def rerank(self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]) -> Ranking:
        """The documents by their relevance to the query, best first."""
        request = RerankRequest(query=query, documents=documents, **options)
        message = rerank_to_proto(request, self._context(request))
        return ranking_from_proto(
            await self._asked(request, message, lambda left_s: self._stub.Rerank(message, timeout=left_s))
        )

    async def score(self, inputs: Iterable[Scored], **options: Unpack[TaskOptions]) -> Scores:
        """The log-probability of each continuation after its context, in one request."""
        request = ScoreRequest(inputs=inputs, **options)
        message = score_to_proto(request, self._context(request))
        return scores_from_proto(
            await self._asked(request, message, lambda left_s: self._stub.Score(message, timeout=left_s))
        )

    def embed_stream(
        self, items: Items[Text | EmbedRequest], *, window: int = TASK_WINDOW, **options: Unpack[EmbedOptions]
    ) -> AsyncGenerator[BatchItem[Embeddings], None]:
        """An outcome an item. A text is a request of its own with `options`; an EmbedRequest has its own."""
        return self._streamed(
            items,
            lambda item: item if isinstance(item, EmbedRequest) else EmbedRequest(texts=[item], **options),
            lambda request, context: _pb.EmbedStreamRequest(request=embed_to_proto(request, context)),
            lambda sending, left_s: self._stub.EmbedStream(sending, timeout=left_s),
            lambda received: embeddings_from_proto(received.response),
            window,
        )

    def classify_stream(
        self,
        items: Items[Text | ClassifyRequest],
        *,
        window: int = TASK_WINDOW,
        **options: Unpack[ClassifyOptions],
    ) -> AsyncGenerator[BatchItem[Classifications], None]:
        """As `embed_stream`."""
        return self._streamed(
            items,
            lambda item: (
                item if isinstance(item, ClassifyRequest) else ClassifyRequest(texts=[item], **options)
            ),
            lambda request, context: _pb.ClassifyStreamRequest(request=classify_to_proto(request, context)),
            lambda sending, left_s: self._stub.ClassifyStream(sending, timeout=left_s),
            lambda received: classifications_from_proto(received.response),
            window,
        )

    def tag_stream(
        self, items: Items[Text | TagRequest], *, window: int = TASK_WINDOW, **options: Unpack[TagOptions]
    ) -> AsyncGenerator[BatchItem[TaggedTexts], None]:
        """As `embed_stream`."""
        return self._streamed(
            items,
            lambda item: item if isinstance(item, TagRequest) else TagRequest(texts=[item], **options),
            lambda request, context: _pb.TagStreamRequest(request=tag_to_proto(request, context)),
            lambda sending, left_s: self._stub.TagStream(sending, timeout=left_s),
            lambda received: tagged_from_proto(received.response),
            window,
        )

    def rerank_stream(
        self, items: Items[RerankRequest], *, window: int = TASK_WINDOW
    ) -> AsyncGenerator[BatchItem[Ranking], None]:
        """As `embed_stream`."""
        return self._streamed(
            items,
            lambda item: item,
            lambda request, context: _pb.RerankStreamRequest(request=rerank_to_proto(request, context)),
            lambda sending, left_s: self._stub.RerankStream(sending, timeout=left_s),
            lambda received: ranking_from_proto(received.response),
            window,
        )

    def score_stream(
        self,
        items: Items[Scored | ScoreRequest],
        *,
        window: int = TASK_WINDOW,
        **options: Unpack[TaskOptions],
    ) -> AsyncGenerator[BatchItem[Scores], None]:
        """As `embed_stream`."""
        return self._streamed(
            items,
            lambda item: item if isinstance(item, ScoreRequest) else ScoreRequest(inputs=[item], **options),
            lambda request, context: _pb.ScoreStreamRequest(request=score_to_proto(request, context)),
            lambda sending, left_s: self._stub.ScoreStream(sending, timeout=left_s),
            lambda received: scores_from_proto(received.response),
            window,
        )

    async def _asked(
        self, request: TaskRequest, message: _Message, call: Callable[[float], Awaitable[_ResponseT]]
    ) -> _ResponseT:
        reconnects = Reconnects(self._reconnects, self._timeout_of(request))
        while True:
            try:
                return await call(reconnects.left_s())
            except grpc.aio.AioRpcError as error:
                failure = from_rpc_error(error)
                if reconnects.total and isinstance(failure, Cancelled) and not is_loss(error):
                    # A gateway saw the call before this one break, and took it for a client that left.
                    message.context.request_id = uuid.uuid4().hex
                    await reconnects.pause_after(failure)
                else:
                    await reconnects.pause(error)

    def _streamed(
        self,
        items: Items[_ItemT],
        to_request: Callable[[_ItemT], _RequestT],
        to_message: Callable[[_RequestT, _pb.TaskContext], _SentT],
        open_call: Callable[[AsyncIterator[_SentT], float], grpc.aio.StreamStreamCall[_SentT, ReceivedT]],
        to_answer: Callable[[ReceivedT], _AnswerT],
        window: int,
    ) -> AsyncGenerator[BatchItem[_AnswerT], None]:
        if isinstance(items, str):
            raise invalid_field("items", "must be several texts; got one str")

        def message(item: _ItemT) -> tuple[str, _SentT]:
            request = to_request(item)
            context = self._context(request)
            return context.request_id, to_message(request, context)

        method = BatchMethod(message, open_call, to_answer, ordered=True, renewed=_renewed)
        return Batch(items, method, Reconnects(self._reconnects, BATCH_S), window).outcomes()

    def _context(self, request: TaskRequest) -> _pb.TaskContext:
        return context_to_proto(
            request, model=self._model, tenant=self._tenant, timeout_s=self._timeout_of(request)
        )


def _renewed(sent: _SentT) -> tuple[str, _SentT]:
    sent.request.context.request_id = uuid.uuid4().hex
    return sent.request.context.request_id, sent
