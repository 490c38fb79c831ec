"""Between protobuf (the registry's answers, the heartbeat, the control port) and plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from treadle.api.registry.v1 import artifact_pb2, deployment_pb2, lease_pb2
from treadle.api.worker.v1 import queue_pb2, worker_pb2
from treadle.deployments import ServingConfiguration
from treadle.errors import TreadleError
from treadle.models.families import ENCODERS
from treadle.models.stored_folder import StoredFile, StoredFolder
from treadle.rpc import to_status
from treadle_worker.engine_protocol import EngineStats, Ready
from treadle_worker.jobs import Artifact
from treadle_worker.models.leases import KnownLease, Served

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
        num_task_inputs=stats.num_task_inputs,
        num_task_tokens=stats.num_task_tokens,
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
