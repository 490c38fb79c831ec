"""Between protobuf (the queue's entries, the registry's answers, the control port) and plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from treadle.api.inference.v1 import generation_pb2
from treadle.api.registry.v1 import artifact_pb2, deployment_pb2, lease_pb2
from treadle.api.worker.v1 import queue_pb2, worker_pb2
from treadle.deployments import ServingConfiguration
from treadle.errors import TreadleError
from treadle.models.families import ENCODERS
from treadle.models.stored_folder import StoredFile, StoredFolder
from treadle.queue import codec
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, LogEntry
from treadle.rpc import to_status
from treadle_worker.engine_protocol import EngineStats, Ready, SamplingParams, TokenLogprobs
from treadle_worker.jobs import Artifact, History, Job
from treadle_worker.models.leases import KnownLease, Served
from treadle_worker.outgoing import Ending, TokenBatch

_PRIORITIES = {generation_pb2.PRIORITY_HIGH: 1, generation_pb2.PRIORITY_LOW: -1}

_FINISH_REASONS = {
    "stop_token": generation_pb2.FINISH_REASON_STOP_TOKEN,
    "stop_string": generation_pb2.FINISH_REASON_STOP_STRING,
    "length": generation_pb2.FINISH_REASON_LENGTH,
}

STATES = {
    "loading": queue_pb2.WORKER_STATE_LOADING,
    "ready": queue_pb2.WORKER_STATE_READY,
    "draining": queue_pb2.WORKER_STATE_DRAINING,
    "failed": queue_pb2.WORKER_STATE_FAILED,
}

_SERVING_STATES = {
    "loading": lease_pb2.SERVING_STATE_LOADING,
    "ready": lease_pb2.SERVING_STATE_READY,
    "draining": lease_pb2.SERVING_STATE_DRAINING,
    "failed": lease_pb2.SERVING_STATE_FAILED,
}


def to_job(data: bytes) -> Job:
    """The job of a lane's entry; raises as `codec.decode` does."""
    entry = codec.decode(queue_pb2.LaneEntry, data)
    return Job(
        request=RequestKeys(entry.tenant, entry.request_id),
        prompt_token_ids=tuple(entry.prompt_token_ids),
        sampling=_sampling(entry),
        stop_strings=tuple(entry.stopping.stop_strings),
        include_stop_string=entry.stopping.include_stop_string,
        include_special_tokens=entry.output.include_special_tokens,
        priority=_PRIORITIES.get(entry.priority, 0),
        timeout_ms=entry.timeout_ms,
        detaches=entry.disconnect_mode == generation_pb2.DISCONNECT_MODE_DETACH,
        retention_ms=entry.retention_ms,
        artifact_digest=entry.artifact_digest,
        tokenizer_digest=entry.tokenizer_digest,
        profile=entry.profile,
        adapter=entry.adapter,
        model_name=entry.model_name,
        traceparent=entry.traceparent,
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


def started_entry(job: Job, cached_tokens: int) -> bytes:
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


def finished_entry(job: Job, ending: Ending, cached_tokens: int, output_tokens: int) -> bytes:
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


def to_artifact(message: artifact_pb2.Artifact) -> Artifact:
    """What the worker needs of the registry's answer."""
    files = tuple(StoredFile(file.path, file.digest, file.bytes) for file in message.files)
    return Artifact(
        message.digest,
        message.compute_digest,
        message.tokenizer_digest,
        StoredFolder(Path(message.location), message.digest, files),
        is_encoder=message.facts.model_type in ENCODERS,
    )


def to_serving_lease(served: Served) -> lease_pb2.ServingLease:
    """What a lease says."""
    configuration = served.configuration
    return lease_pb2.ServingLease(
        configuration=deployment_pb2.ServingConfiguration(
            dtype=configuration.dtype,
            quantization=configuration.quantization,
            cache_dtype=configuration.cache_dtype,
        ),
        state=_SERVING_STATES[served.state],
        alias=served.alias,
        error=None if served.error is None else to_status(served.error),
    )


def to_known_lease(lease: lease_pb2.Lease) -> KnownLease:
    """A worker's lease as the registry lists it."""
    asked = lease.serving.configuration
    states = {number: name for name, number in _SERVING_STATES.items()}
    return KnownLease(
        lease.lease_id,
        lease.serving.alias,
        ServingConfiguration(asked.dtype, asked.quantization, asked.cache_dtype),
        states.get(lease.serving.state, ""),
    )


def to_loaded_profile(
    model: str,
    artifact: Artifact,
    profile: str,
    configuration: ServingConfiguration,
    state: str,
    ready: Ready | None,
    failure: TreadleError | None,
) -> queue_pb2.LoadedProfile:
    """A model in the heartbeat, its configuration complete; without `ready` its engine's sizes are not
    known yet."""
    loaded = queue_pb2.LoadedProfile(
        profile=profile,
        artifact_digest=artifact.digest,
        compute_digest=artifact.compute_digest,
        tokenizer_digest=artifact.tokenizer_digest,
        model_name=model,
        dtype=configuration.dtype,
        quantization=configuration.quantization,
        cache_dtype=configuration.cache_dtype,
        state=STATES[state],
    )
    if ready is not None:
        loaded.max_model_len = ready.max_model_len
        loaded.vocab_size = ready.vocab_size
        loaded.num_kv_blocks = ready.num_blocks
        loaded.block_size = ready.block_size
    if failure is not None:
        loaded.error.CopyFrom(to_status(failure))
    return loaded


def to_engine_status(
    stats: EngineStats, process_id: int, resident_bytes: int, turn_s: float = 0.0, turn_waited_s: float = 0.0
) -> worker_pb2.EngineStatus:
    """The engine's gauges and counters for the control port."""
    return worker_pb2.EngineStatus(
        num_requests_running=stats.num_running,
        num_requests_waiting=stats.num_waiting,
        num_free_blocks=stats.num_free_blocks,
        num_steps=stats.num_steps,
        num_preemptions=stats.num_preemptions,
        prefix_cache_queries=stats.prefix_cache_queries,
        prefix_cache_hits=stats.prefix_cache_hits,
        num_prompt_tokens=stats.num_prompt_tokens,
        num_output_tokens=stats.num_output_tokens,
        process_id=process_id,
        resident_bytes=resident_bytes,
        device_allocated_bytes=stats.device_memory.allocated_bytes,
        device_reserved_bytes=stats.device_memory.reserved_bytes,
        device_peak_bytes=stats.device_memory.peak_bytes,
        device_total_bytes=stats.device_memory.total_bytes,
        turn_seconds=turn_s,
        turn_waited_seconds=turn_waited_s,
    )


def to_heartbeat(
    consumer: str, address: str, state: str, profiles: Sequence[queue_pb2.LoadedProfile], uptime_ms: int
) -> queue_pb2.Heartbeat:
    """The worker's heartbeat."""
    return queue_pb2.Heartbeat(
        consumer=consumer, address=address, state=STATES[state], profiles=profiles, uptime_ms=uptime_ms
    )
