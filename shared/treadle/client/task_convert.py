"""Between the tasks' dataclasses and the contract's messages."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import TypeVar

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.client.convert import duration_to_proto, priority_to_proto
from treadle.client.task_answer import (
    Classifications,
    ContinuationScore,
    Embeddings,
    LabelScore,
    RankedDocument,
    Ranking,
    Scores,
    TaggedSpan,
    TaggedTexts,
)
from treadle.client.task_request import (
    ClassifyRequest,
    EmbedRequest,
    RerankRequest,
    Scored,
    ScoreInput,
    ScoreRequest,
    TagRequest,
    TaskRequest,
    Text,
    Texts,
)
from treadle.errors import Internal, InvalidArgument, invalid_field

_FLOAT_BYTES = 4
_POOLINGS = {
    None: inference_pb2.POOLING_UNSPECIFIED,
    "mean": inference_pb2.POOLING_MEAN,
    "cls": inference_pb2.POOLING_CLS,
    "last": inference_pb2.POOLING_LAST,
}
_AGGREGATIONS = {
    None: inference_pb2.AGGREGATION_UNSPECIFIED,
    "none": inference_pb2.AGGREGATION_NONE,
    "simple": inference_pb2.AGGREGATION_SIMPLE,
    "first": inference_pb2.AGGREGATION_FIRST,
    "max": inference_pb2.AGGREGATION_MAX,
}
_K = TypeVar("_K")
_V = TypeVar("_V")


def embed_to_proto(request: EmbedRequest, context: inference_pb2.TaskContext) -> inference_pb2.EmbedRequest:
    """Raises InvalidArgument, as the others, for what no message can say."""
    return _built(
        lambda: inference_pb2.EmbedRequest(
            context=context,
            inputs=_inputs(request.texts),
            pooling=_known("pooling", request.pooling, _POOLINGS),
            normalize=request.normalize,
            dimensions=request.dimensions,
            prompt_name=request.prompt_name,
            truncate=request.truncate,
        )
    )


def classify_to_proto(
    request: ClassifyRequest, context: inference_pb2.TaskContext
) -> inference_pb2.ClassifyRequest:
    """The message of a request."""
    return _built(
        lambda: inference_pb2.ClassifyRequest(
            context=context,
            inputs=_inputs(request.texts),
            multi_label=request.multi_label,
            top_k=request.top_k,
            truncate=request.truncate,
        )
    )


def tag_to_proto(request: TagRequest, context: inference_pb2.TaskContext) -> inference_pb2.TagRequest:
    """The message of a request."""
    return _built(
        lambda: inference_pb2.TagRequest(
            context=context,
            inputs=_inputs(request.texts),
            aggregation=_known("aggregation", request.aggregation, _AGGREGATIONS),
            truncate=request.truncate,
            include_outside=request.include_outside,
        )
    )


def rerank_to_proto(
    request: RerankRequest, context: inference_pb2.TaskContext
) -> inference_pb2.RerankRequest:
    """The message of a request."""
    if isinstance(request.documents, str):
        raise invalid_field("documents", "must be several texts; got one str")
    return _built(
        lambda: inference_pb2.RerankRequest(
            context=context,
            query=request.query,
            documents=request.documents,
            top_n=request.top_n,
            truncate=request.truncate,
            raw_scores=request.raw_scores,
        )
    )


def score_to_proto(request: ScoreRequest, context: inference_pb2.TaskContext) -> inference_pb2.ScoreRequest:
    """The message of a request."""
    return _built(
        lambda: inference_pb2.ScoreRequest(context=context, inputs=[_scored(one) for one in request.inputs])
    )


def context_to_proto(
    request: TaskRequest, *, model: str, tenant: str, timeout_s: float
) -> inference_pb2.TaskContext:
    """What every task carries, with the client's model, tenant and timeout where it has none of its own.

    Always has a request_id.
    """
    return _built(
        lambda: inference_pb2.TaskContext(
            request_id=request.request_id or uuid.uuid4().hex,
            tenant=request.tenant or tenant,
            model=request.model or model,
            profile=request.profile,
            priority=priority_to_proto(request.priority),
            timeout=duration_to_proto(timeout_s),
        )
    )


def _built(build: Callable[[], _V]) -> _V:
    try:
        return build()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"an option has a type or a range that the contract does not know: {error}"
        ) from error


def _known(name: str, value: _K, known: dict[_K, _V]) -> _V:
    if value not in known:
        names = ", ".join(f'"{key}"' for key in known if key is not None)
        raise invalid_field(name, f"must be one of {names}; got {value!r}")
    return known[value]


def _inputs(texts: Texts) -> list[inference_pb2.TextInput]:
    return [_input(text) for text in ([texts] if isinstance(texts, str) else texts)]


def _input(text: Text) -> inference_pb2.TextInput:
    if isinstance(text, str):
        return inference_pb2.TextInput(text=text)
    first, second = text
    return inference_pb2.TextInput(text=first, pair=second)


def _scored(scored: Scored) -> inference_pb2.ScoreInput:
    one = scored if isinstance(scored, ScoreInput) else ScoreInput(*scored)
    message = inference_pb2.ScoreInput()
    if isinstance(one.context, str):
        message.context = one.context
    else:
        message.context_token_ids.CopyFrom(_ids(one.context, one.tokenizer_digest))
    if isinstance(one.continuation, str):
        message.continuation = one.continuation
    else:
        message.continuation_token_ids.CopyFrom(_ids(one.continuation, one.tokenizer_digest))
    return message


def _ids(ids: Iterable[int], tokenizer_digest: str) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=ids, tokenizer_digest=tokenizer_digest)


def embeddings_from_proto(response: inference_pb2.EmbedResponse) -> Embeddings:
    """Raises Internal for a tensor that is none of float32 rows."""
    tensor = response.embeddings
    shape = tuple(tensor.shape)
    if len(shape) != 2 or tensor.dtype != "F32" or len(tensor.data) != shape[0] * shape[1] * _FLOAT_BYTES:
        raise Internal(
            f"the embeddings are no float32 rows: {tensor.dtype or 'no type'} {list(shape)} in "
            f"{len(tensor.data)} bytes; use a client of the gateway's release"
        )
    return Embeddings(
        response.artifact_digest,
        response.profile,
        response.prompt_tokens,
        data=tensor.data,
        shape=(shape[0], shape[1]),
    )


def classifications_from_proto(response: inference_pb2.ClassifyResponse) -> Classifications:
    """The labels of each text."""
    return Classifications(
        response.artifact_digest,
        response.profile,
        response.prompt_tokens,
        labels=tuple(
            tuple(LabelScore(one.label, one.score) for one in text.labels)
            for text in response.classifications
        ),
    )


def tagged_from_proto(response: inference_pb2.TagResponse) -> TaggedTexts:
    """The spans of each text."""
    return TaggedTexts(
        response.artifact_digest,
        response.profile,
        response.prompt_tokens,
        spans=tuple(
            tuple(TaggedSpan(one.start, one.end, one.label, one.score) for one in text.spans)
            for text in response.texts
        ),
    )


def ranking_from_proto(response: inference_pb2.RerankResponse) -> Ranking:
    """The documents, best first."""
    return Ranking(
        response.artifact_digest,
        response.profile,
        response.prompt_tokens,
        documents=tuple(RankedDocument(one.index, one.score) for one in response.documents),
    )


def scores_from_proto(response: inference_pb2.ScoreResponse) -> Scores:
    """One score an input."""
    return Scores(
        response.artifact_digest,
        response.profile,
        response.prompt_tokens,
        scores=tuple(
            ContinuationScore(tuple(one.token_ids), tuple(one.logprobs), one.total_logprob, one.greedy)
            for one in response.scores
        ),
    )
