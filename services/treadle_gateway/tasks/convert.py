"""The tasks' messages to plain Python and back, and their work as the entry of a lane."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from treadle.api.inference.v1 import generation_pb2
from treadle.api.inference.v1 import inference_pb2 as pb
from treadle.api.worker.v1 import queue_pb2
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.queue import keys
from treadle.queue.keys import RequestKeys
from treadle.security import Principal
from treadle_gateway.convert import PRIORITIES, seconds
from treadle_gateway.generation import DEFAULT_TENANT, TokenPrompt
from treadle_gateway.tasks import work
from treadle_gateway.tasks.task import (
    ClassifyTask,
    EmbedTask,
    RerankTask,
    ScoreInput,
    ScoreTask,
    TagTask,
    Task,
    TaskContext,
    TextInput,
)

Request = pb.EmbedRequest | pb.ClassifyRequest | pb.TagRequest | pb.RerankRequest | pb.ScoreRequest


def to_embed(message: pb.EmbedRequest, caller: Principal) -> EmbedTask:
    """Raises PermissionDenied for a foreign tenant, as all of these."""
    return EmbedTask(
        context=_context(message, caller),
        inputs=_texts(message.inputs),
        pooling=message.pooling,
        normalize=message.normalize if message.HasField("normalize") else None,
        dimensions=message.dimensions if message.HasField("dimensions") else None,
        prompt_name=message.prompt_name,
        truncate=message.truncate,
    )


def to_classify(message: pb.ClassifyRequest, caller: Principal) -> ClassifyTask:
    """See to_embed."""
    return ClassifyTask(
        context=_context(message, caller),
        inputs=_texts(message.inputs),
        multi_label=message.multi_label if message.HasField("multi_label") else None,
        top_k=message.top_k if message.HasField("top_k") else None,
        truncate=message.truncate,
    )


def to_tag(message: pb.TagRequest, caller: Principal) -> TagTask:
    """See to_embed."""
    return TagTask(
        context=_context(message, caller),
        inputs=_texts(message.inputs),
        aggregation=message.aggregation,
        truncate=message.truncate,
        include_outside=message.include_outside,
    )


def to_rerank(message: pb.RerankRequest, caller: Principal) -> RerankTask:
    """See to_embed."""
    return RerankTask(
        context=_context(message, caller),
        query=message.query,
        documents=tuple(message.documents),
        top_n=message.top_n if message.HasField("top_n") else None,
        truncate=message.truncate,
        raw_scores=message.raw_scores,
    )


def to_score(message: pb.ScoreRequest, caller: Principal) -> ScoreTask:
    """See to_embed."""
    return ScoreTask(
        context=_context(message, caller),
        inputs=tuple(
            ScoreInput(
                one.context,
                one.continuation,
                _ids(one.context_token_ids) if one.HasField("context_token_ids") else None,
                _ids(one.continuation_token_ids) if one.HasField("continuation_token_ids") else None,
            )
            for one in message.inputs
        ),
    )


def _context(message: Request, caller: Principal) -> TaskContext:
    said = message.context
    tenant = caller.tenant_for(said.tenant, default=DEFAULT_TENANT, field="context.tenant")
    return TaskContext(
        request_id=said.request_id,
        tenant=tenant,
        model=said.model,
        profile=said.profile,
        adapter=said.adapter,
        priority=said.priority,
        timeout_s=seconds(said.timeout) if said.HasField("timeout") else None,
        payload_digest=_payload_digest(message, tenant),
    )


def _payload_digest(message: Request, tenant: str) -> str:
    """What makes two requests with one id the same: all but the id itself and the time that is left."""
    payload = type(message)()
    payload.MergeFrom(message)  # type: ignore[arg-type]
    payload.context.ClearField("request_id")
    payload.context.ClearField("timeout")
    payload.context.tenant = tenant
    # Two tasks may have the same bytes, and a generation, too.
    digest = hashlib.sha256(f"{message.DESCRIPTOR.full_name}\0".encode())
    digest.update(payload.SerializeToString(deterministic=True))
    return f"sha256:{digest.hexdigest()}"


def _texts(inputs: Iterable[pb.TextInput]) -> tuple[TextInput, ...]:
    return tuple(TextInput(one.text, one.pair if one.HasField("pair") else None) for one in inputs)


def _ids(message: generation_pb2.TokenIds) -> TokenPrompt:
    return TokenPrompt(tuple(message.ids), message.tokenizer_digest)


def to_lane_entry(
    task: Task,
    request: RequestKeys,
    prepared: work.Prepared,
    *,
    gateway_id: str,
    timeout_ms: int,
    traceparent: str = "",
) -> LaneEntry:
    """A prepared task as the entry of its lane."""
    context, artifact = task.context, prepared.model.artifact
    return LaneEntry(
        request_id=request.request_id,
        tenant=request.tenant,
        artifact_digest=artifact.digest,
        tokenizer_digest=artifact.tokenizer_digest,
        profile=prepared.model.profile,
        priority=PRIORITIES[context.priority],
        timeout_ms=timeout_ms,
        disconnect_mode=generation_pb2.DISCONNECT_MODE_CANCEL,
        retention_ms=keys.RETENTION_MS,
        gateway_id=gateway_id,
        payload_digest=context.payload_digest,
        traceparent=traceparent,
        model_name=context.model,
        task=_task_work(prepared.plan),
    )


def _task_work(plan: work.Plan) -> queue_pb2.TaskWork:
    message = queue_pb2.TaskWork()
    match plan.work:
        case work.EmbedWork() as embed:
            message.embed.CopyFrom(_embed_work(embed))
        case work.ClassifyWork(activation):
            message.classify.CopyFrom(queue_pb2.ClassifyWork(activation=activation))
        case work.TagWork():
            message.tag.SetInParent()
        case work.RankWork(activation, embed):
            by_embeddings = None if embed is None else _embed_work(embed)
            message.rank.CopyFrom(queue_pb2.RankWork(activation=activation, embed=by_embeddings))
        case work.ScoreWork():
            message.score.SetInParent()
    for one in plan.inputs:
        message.inputs.add(token_ids=one.ids, type_ids=one.type_ids, first=one.first)
    return message


def _embed_work(embed: work.EmbedWork) -> queue_pb2.EmbedWork:
    return queue_pb2.EmbedWork(pooling=embed.pooling, normalize=embed.normalize, dimensions=embed.dimensions)


def to_embed_response(answer: work.TaskAnswer) -> pb.EmbedResponse:
    """The vectors as they came."""
    outcome = answer.outcome
    assert isinstance(outcome, work.Embeddings)
    tensor = pb.Tensor(shape=[outcome.rows, outcome.dimensions], dtype="F32", data=outcome.data)
    return pb.EmbedResponse(
        artifact_digest=answer.artifact_digest,
        profile=answer.profile,
        embeddings=tensor,
        prompt_tokens=answer.prompt_tokens,
    )


def to_classify_response(answer: work.TaskAnswer) -> pb.ClassifyResponse:
    """Labels, best first."""
    outcome = answer.outcome
    assert isinstance(outcome, work.Classifications)
    return pb.ClassifyResponse(
        artifact_digest=answer.artifact_digest,
        profile=answer.profile,
        classifications=[
            pb.Classification(labels=[pb.LabelScore(label=label, score=score) for label, score in row])
            for row in outcome.rows
        ],
        prompt_tokens=answer.prompt_tokens,
    )


def to_tag_response(answer: work.TaskAnswer) -> pb.TagResponse:
    """Spans, in their order."""
    outcome = answer.outcome
    assert isinstance(outcome, work.TaggedTexts)
    return pb.TagResponse(
        artifact_digest=answer.artifact_digest,
        profile=answer.profile,
        texts=[
            pb.TaggedText(
                spans=[
                    pb.TaggedSpan(start=span.start, end=span.end, label=span.label, score=span.score)
                    for span in row
                ]
            )
            for row in outcome.rows
        ],
        prompt_tokens=answer.prompt_tokens,
    )


def to_rerank_response(answer: work.TaskAnswer) -> pb.RerankResponse:
    """Documents, best first."""
    outcome = answer.outcome
    assert isinstance(outcome, work.Ranking)
    return pb.RerankResponse(
        artifact_digest=answer.artifact_digest,
        profile=answer.profile,
        documents=[pb.RankedDocument(index=index, score=score) for index, score in outcome.documents],
        prompt_tokens=answer.prompt_tokens,
    )


def to_score_response(answer: work.TaskAnswer) -> pb.ScoreResponse:
    """Log-probabilities, and their sum as a double."""
    outcome = answer.outcome
    assert isinstance(outcome, work.Scores)
    return pb.ScoreResponse(
        artifact_digest=answer.artifact_digest,
        profile=answer.profile,
        scores=[
            pb.ContinuationScore(
                token_ids=row.ids,
                logprobs=row.logprobs,
                total_logprob=sum(row.logprobs),
                greedy=row.greedy,
            )
            for row in outcome.rows
        ],
        prompt_tokens=answer.prompt_tokens,
    )
