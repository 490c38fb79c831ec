"""Protobuf to plain Python and back: the only place in the gateway where both are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from google.protobuf.duration_pb2 import Duration

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.api.inference.v1.generation_pb2 import (
    ChoiceFinish,
    Finished,
    GenerateChunk,
    Started,
    TokenDelta,
)
from treadle.api.worker.v1.queue_pb2 import WORKER_STATE_READY, Heartbeat, LaneEntry
from treadle.deployments import ServingConfiguration
from treadle.queue import keys
from treadle.queue.keys import RequestKeys
from treadle.rpc import from_status, to_status
from treadle.security import ANYBODY, Principal
from treadle_gateway.artifact import TaskFacts
from treadle_gateway.generation import (
    DEFAULT_TENANT,
    ChatMessage,
    ChatPrompt,
    DisconnectMode,
    Generation,
    Output,
    Priority,
    Prompt,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)
from treadle_gateway.listing import Listed
from treadle_gateway.models import Loaded, ServedModel
from treadle_gateway.token_stream import Chunk

__all__ = [
    "PRIORITIES",
    "ResponseBuilder",
    "from_status",
    "seconds",
    "to_chunk",
    "to_generation",
    "to_lane_entry",
    "to_loaded",
    "to_served_model",
    "to_status",
]

PRIORITIES: Mapping[int, generation_pb2.Priority.ValueType] = {
    Priority.UNSPECIFIED: generation_pb2.PRIORITY_NORMAL,
    Priority.LOW: generation_pb2.PRIORITY_LOW,
    Priority.NORMAL: generation_pb2.PRIORITY_NORMAL,
    Priority.HIGH: generation_pb2.PRIORITY_HIGH,
}


def to_generation(message: generation_pb2.Generation, caller: Principal = ANYBODY) -> Generation:
    """The request in plain Python, its tenant checked: raises PermissionDenied for a foreign one."""
    disconnect = message.disconnect
    tenant = caller.tenant_for(message.tenant, default=DEFAULT_TENANT, field="generation.tenant")
    return Generation(
        request_id=message.request_id,
        tenant=tenant,
        model=message.model,
        profile=message.profile,
        adapter=message.adapter,
        priority=message.priority,
        prompt=_prompt(message),
        sampling=_sampling(message.sampling),
        stopping=_stopping(message.stopping),
        output=Output(
            logprobs=message.output.logprobs if message.output.HasField("logprobs") else None,
            include_special_tokens=message.output.include_special_tokens,
        ),
        disconnect_mode=disconnect.mode,
        retention_s=seconds(disconnect.retention) if disconnect.HasField("retention") else None,
        timeout_s=seconds(message.timeout) if message.HasField("timeout") else None,
        payload_digest=_payload_digest(message, tenant),
    )


def _payload_digest(message: generation_pb2.Generation, tenant: str) -> str:
    """What makes two requests with one id the same: all but the id itself and the time that is left."""
    payload = generation_pb2.Generation()
    payload.CopyFrom(message)
    payload.ClearField("request_id")
    payload.ClearField("timeout")
    payload.tenant = tenant
    return "sha256:" + hashlib.sha256(payload.SerializeToString(deterministic=True)).hexdigest()


def seconds(duration: Duration) -> float:
    """Its seconds, whatever a client made of it."""
    # ToTimedelta would raise for what a client may send.
    return duration.seconds + duration.nanos / 1e9


def _prompt(message: generation_pb2.Generation) -> Prompt | None:
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text)
        case "token_ids":
            return TokenPrompt(tuple(message.token_ids.ids), message.token_ids.tokenizer_digest)
        case "chat":
            chat = message.chat
            return ChatPrompt(
                tuple(ChatMessage(one.role, one.content) for one in chat.messages),
                chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None,
                chat.template_arguments_json,
            )
        case _:
            return None


def _sampling(message: generation_pb2.SamplingParameters) -> Sampling:
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else None,
        top_k=message.top_k if message.HasField("top_k") else None,
        top_p=message.top_p if message.HasField("top_p") else None,
        min_p=message.min_p if message.HasField("min_p") else None,
        seed=message.seed if message.HasField("seed") else None,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else None,
        presence_penalty=message.presence_penalty if message.HasField("presence_penalty") else None,
        frequency_penalty=message.frequency_penalty if message.HasField("frequency_penalty") else None,
        logit_bias=dict(message.logit_bias),
        n=message.n if message.HasField("n") else None,
    )


def _stopping(message: generation_pb2.StoppingCriteria) -> Stopping:
    return Stopping(
        max_new_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else None,
        min_new_tokens=message.min_new_tokens if message.HasField("min_new_tokens") else None,
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_string=message.include_stop_string,
    )


def to_lane_entry(
    generation: Generation,
    request: RequestKeys,
    model: ServedModel,
    prompt_ids: Iterable[int],
    *,
    gateway_id: str,
    timeout_ms: int,
    traceparent: str = "",
) -> LaneEntry:
    """A complete request as the entry of its lane."""
    sampling, stopping, output = generation.sampling, generation.stopping, generation.output
    default_retention_ms = keys.DETACH_RETENTION_MS if generation.detaches else keys.RETENTION_MS
    retention_s = generation.retention_s
    return LaneEntry(
        request_id=request.request_id,
        tenant=request.tenant,
        artifact_digest=model.artifact.digest,
        tokenizer_digest=model.artifact.tokenizer_digest,
        profile=model.profile,
        priority=PRIORITIES[Priority(generation.priority)],
        prompt_token_ids=prompt_ids,
        sampling=generation_pb2.SamplingParameters(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=sampling.logit_bias,
            n=sampling.n,
        ),
        stopping=generation_pb2.StoppingCriteria(
            max_new_tokens=stopping.max_new_tokens,
            min_new_tokens=stopping.min_new_tokens,
            stop_strings=stopping.stop_strings,
            stop_token_ids=stopping.stop_token_ids,
            ignore_eos=stopping.ignore_eos,
            include_stop_string=stopping.include_stop_string,
        ),
        output=generation_pb2.OutputOptions(
            logprobs=output.logprobs, include_special_tokens=output.include_special_tokens
        ),
        timeout_ms=timeout_ms,
        disconnect_mode=(
            generation_pb2.DISCONNECT_MODE_DETACH
            if generation.disconnect_mode == DisconnectMode.DETACH
            else generation_pb2.DISCONNECT_MODE_CANCEL
        ),
        retention_ms=default_retention_ms if retention_s is None else max(1, round(retention_s * 1000)),
        gateway_id=gateway_id,
        payload_digest=generation.payload_digest,
        model_name=generation.model,
        traceparent=traceparent,
    )


def to_chunk(chunk: Chunk, request: RequestKeys) -> GenerateChunk:
    """A chunk with its cursor."""
    cursor = chunk.cursor.encode(request)
    match chunk.body:
        case Started():
            return GenerateChunk(cursor=cursor, started=chunk.body)
        case TokenDelta():
            return GenerateChunk(cursor=cursor, tokens=chunk.body)
        case _:
            return GenerateChunk(cursor=cursor, finished=chunk.body)


class ResponseBuilder:
    """Gathers a stream's chunks into the one answer of Generate."""

    def __init__(self) -> None:
        self._response = inference_pb2.GenerateResponse()
        self._texts: dict[int, list[str]] = {}
        self._choices: dict[int, generation_pb2.Choice] = {}

    def add(self, chunk: Chunk) -> None:
        """Takes the next chunk."""
        match chunk.body:
            case Started():
                self._response.started.CopyFrom(chunk.body)
            case TokenDelta():
                choice = self._choice(chunk.body.choice)
                choice.token_ids.extend(chunk.body.token_ids)
                choice.logprobs.extend(chunk.body.logprobs)
                self._texts[choice.index].append(chunk.body.text)
            case Finished():
                self._response.usage.CopyFrom(chunk.body.usage)
                for finish in chunk.body.choices:
                    self._finish(finish)

    def _choice(self, index: int) -> generation_pb2.Choice:
        self._texts.setdefault(index, [])
        return self._choices.setdefault(index, generation_pb2.Choice(index=index))

    def _finish(self, finish: ChoiceFinish) -> None:
        choice = self._choice(finish.choice)
        choice.finish_reason = finish.finish_reason
        choice.stop_string = finish.stop_string
        if finish.HasField("stop_token_id"):
            choice.stop_token_id = finish.stop_token_id

    def build(self) -> inference_pb2.GenerateResponse:
        """The answer, its choices in the order of their index."""
        for index in sorted(self._choices):
            choice = self._choices[index]
            choice.text = "".join(self._texts[index])
            self._response.choices.append(choice)
        return self._response


def to_loaded(heartbeats: Iterable[Heartbeat]) -> list[Loaded]:
    """What the workers have, from their heartbeats."""
    return [
        Loaded(
            profile=one.profile,
            artifact_digest=one.artifact_digest,
            compute_digest=one.compute_digest,
            tokenizer_digest=one.tokenizer_digest,
            model_name=one.model_name,
            max_model_len=one.max_model_len,
            vocab_size=one.vocab_size,
            ready=heartbeat.state == one.state == WORKER_STATE_READY,
            error=from_status(one.error) if one.HasField("error") else None,
            worker=heartbeat.consumer,
            configuration=ServingConfiguration(one.dtype, one.quantization, one.cache_dtype),
        )
        for heartbeat in heartbeats
        for one in heartbeat.profiles
    ]


def to_served_model(listed: Listed) -> inference_pb2.ServedModel:
    """A line of ListModels."""
    facts = listed.facts or TaskFacts(tasks=())
    return inference_pb2.ServedModel(
        model=listed.model,
        artifact_digest=listed.artifact_digest,
        profile=listed.profile,
        max_model_len=listed.max_model_len,
        vocab_size=listed.vocab_size,
        ready_workers=listed.ready_workers,
        error=None if listed.error is None else to_status(listed.error),
        tasks=facts.tasks,
        labels=facts.labels if {"classify", "tag"} & set(facts.tasks) else (),
        embedding_dimensions=facts.embedding_dimensions if "embed" in facts.tasks else 0,
        prompt_names=sorted(facts.prompts),
    )
