"""Between the queue's entries, which are protobuf, and plain Python."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from treadle.api.inference.v1 import generation_pb2
from treadle.api.worker.v1 import queue_pb2
from treadle.errors import TreadleError
from treadle.queue import codec
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, LogEntry
from treadle.rpc import to_status
from treadle_worker.engine_protocol import SamplingParams, TaskInput, TokenLogprobs
from treadle_worker.jobs import GenerationJob, History, Job, TaskJob
from treadle_worker.outgoing import Ending, TokenBatch

_PRIORITIES = {generation_pb2.PRIORITY_HIGH: 1, generation_pb2.PRIORITY_LOW: -1}

_FINISH_REASONS = {
    "stop_token": generation_pb2.FINISH_REASON_STOP_TOKEN,
    "stop_string": generation_pb2.FINISH_REASON_STOP_STRING,
    "length": generation_pb2.FINISH_REASON_LENGTH,
}


def to_job(data: bytes) -> Job:
    """The job of a lane's entry; raises as `codec.decode` does."""
    entry = codec.decode(queue_pb2.LaneEntry, data)
    return _task_job(entry) if entry.HasField("task") else _generation_job(entry)


class _Common(TypedDict):
    request: RequestKeys
    priority: int
    timeout_ms: int
    detaches: bool
    retention_ms: int
    artifact_digest: str
    tokenizer_digest: str
    profile: str
    adapter: str
    model_name: str
    traceparent: str


def _common(entry: queue_pb2.LaneEntry) -> _Common:
    return {
        "request": RequestKeys(entry.tenant, entry.request_id),
        "priority": _PRIORITIES.get(entry.priority, 0),
        "timeout_ms": entry.timeout_ms,
        "detaches": entry.disconnect_mode == generation_pb2.DISCONNECT_MODE_DETACH,
        "retention_ms": entry.retention_ms,
        "artifact_digest": entry.artifact_digest,
        "tokenizer_digest": entry.tokenizer_digest,
        "profile": entry.profile,
        "adapter": entry.adapter,
        "model_name": entry.model_name,
        "traceparent": entry.traceparent,
    }


def _generation_job(entry: queue_pb2.LaneEntry) -> GenerationJob:
    return GenerationJob(
        **_common(entry),
        prompt_token_ids=tuple(entry.prompt_token_ids),
        sampling=_sampling(entry),
        stop_strings=tuple(entry.stopping.stop_strings),
        include_stop_string=entry.stopping.include_stop_string,
        include_special_tokens=entry.output.include_special_tokens,
    )


def _task_job(entry: queue_pb2.LaneEntry) -> TaskJob:
    work = entry.task
    task = work.WhichOneof("task") or ""
    embed = work.rank.embed if task == "rank" else work.embed
    asked = work.rank.activation if task == "rank" else work.classify.activation
    inputs = tuple(
        TaskInput(token_ids=list(one.token_ids), type_ids=list(one.type_ids), first=one.first)
        for one in work.inputs
    )
    return TaskJob(
        **_common(entry),
        task=task,
        inputs=inputs,
        pooling=embed.pooling,
        normalize=embed.normalize,
        dimensions=embed.dimensions,
        activation=asked,
    )


def _sampling(entry: queue_pb2.LaneEntry) -> SamplingParams:
    asked, stopping = entry.sampling, entry.stopping
    return SamplingParams(
        temperature=asked.temperature if asked.HasField("temperature") else 1.0,
        top_k=asked.top_k,
        top_p=asked.top_p if asked.HasField("top_p") else 1.0,
        min_p=asked.min_p,
        seed=asked.seed,
        repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else 1.0,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=dict(asked.logit_bias),
        stop_token_ids=tuple(stopping.stop_token_ids),
        max_new_tokens=stopping.max_new_tokens,
        min_new_tokens=stopping.min_new_tokens,
        logprobs=entry.output.logprobs if entry.output.HasField("logprobs") else None,
    )


def to_history(entries: Iterable[LogEntry]) -> History:
    """What earlier owners delivered, each token once."""
    started, cached_tokens, last = False, 0, START
    token_ids: list[int] = []
    for id_, entry in entries:
        if entry.HasField("fence"):
            continue
        last = id_
        if entry.HasField("started"):
            started, cached_tokens = True, entry.started.cached_tokens
        elif entry.HasField("tokens") and entry.tokens.index == len(token_ids):
            token_ids.extend(entry.tokens.token_ids)
    return History(started, cached_tokens, token_ids, last)


def started_entry(job: GenerationJob, cached_tokens: int) -> bytes:
    """The entry with the prompt's facts."""
    started = generation_pb2.Started(
        request_id=job.request.request_id,
        artifact_digest=job.artifact_digest,
        profile=job.profile,
        prompt_tokens=len(job.prompt_token_ids),
        cached_tokens=cached_tokens,
        seed=job.sampling.seed,
        tokenizer_digest=job.tokenizer_digest,
    )
    return codec.encode(queue_pb2.StreamEntry(started=started))


def tokens_entry(batch: TokenBatch) -> bytes:
    """The entry of some tokens."""
    delta = generation_pb2.TokenDelta(
        index=batch.index,
        token_ids=batch.token_ids,
        text="".join(batch.texts),
        logprobs=[_logprobs(one) for one in batch.logprobs],
    )
    return codec.encode(queue_pb2.StreamEntry(tokens=delta))


def _logprobs(one: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    top = [generation_pb2.TokenLogprob(token_id=number, logprob=logprob) for number, logprob in one.top]
    return generation_pb2.TokenLogprobs(logprob=one.logprob, top=top)


def finished_entry(job: GenerationJob, ending: Ending, cached_tokens: int, output_tokens: int) -> bytes:
    """The entry of a good end."""
    choice = generation_pb2.ChoiceFinish(
        finish_reason=_FINISH_REASONS[ending.reason],
        stop_string=ending.stop_string,
        stop_token_id=ending.stop_token_id,
    )
    usage = generation_pb2.Usage(
        prompt_tokens=len(job.prompt_token_ids), cached_tokens=cached_tokens, output_tokens=output_tokens
    )
    finished = generation_pb2.Finished(choices=[choice], usage=usage)
    return codec.encode(queue_pb2.StreamEntry(terminal=queue_pb2.Terminal(finished=finished)))


def error_entry(error: TreadleError) -> bytes:
    """The entry of a bad end."""
    return codec.encode(queue_pb2.StreamEntry(terminal=queue_pb2.Terminal(error=to_status(error))))


def result_entry(job: TaskJob, data: bytes) -> bytes:
    """The entry of a task's good end."""
    result = queue_pb2.TaskResult(data=data, artifact_digest=job.artifact_digest, profile=job.profile)
    return codec.encode(queue_pb2.StreamEntry(terminal=queue_pb2.Terminal(task_result=result)))
