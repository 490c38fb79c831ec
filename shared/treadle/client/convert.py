"""Between the client's dataclasses and the contract's messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf import duration_pb2

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.client.answer import Answer, Choice, Chunk, Prompt, ServedModel, TokenLogprobs, Usage
from treadle.client.request import GenerationRequest, Message
from treadle.errors import InvalidArgument, invalid_field

_PRIORITIES = {
    "low": generation_pb2.PRIORITY_LOW,
    "normal": generation_pb2.PRIORITY_NORMAL,
    "high": generation_pb2.PRIORITY_HIGH,
}
_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP_TOKEN: "stop_token",
    generation_pb2.FINISH_REASON_STOP_STRING: "stop_string",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


def generation_to_proto(
    request: GenerationRequest, *, model: str = "", tenant: str = "", timeout_s: float
) -> generation_pb2.Generation:
    """The message of a request, with the client's model, tenant and timeout where it has none of its own.

    Always carries a request_id. Raises InvalidArgument for what no message can say.
    """
    priority = priority_to_proto(request.priority)
    try:
        generation = generation_pb2.Generation(
            request_id=request.request_id or uuid.uuid4().hex,
            tenant=request.tenant or tenant,
            model=request.model or model,
            profile=request.profile,
            adapter=request.adapter,
            priority=priority,
            sampling=generation_pb2.SamplingParameters(
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                min_p=request.min_p,
                seed=request.seed,
                repetition_penalty=request.repetition_penalty,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                logit_bias=dict(request.logit_bias or {}),
                n=request.n,
            ),
            stopping=generation_pb2.StoppingCriteria(
                max_new_tokens=request.max_new_tokens,
                min_new_tokens=request.min_new_tokens,
                stop_strings=request.stop_strings,
                stop_token_ids=request.stop_token_ids,
                ignore_eos=request.ignore_eos,
                include_stop_string=request.include_stop_string,
            ),
            output=generation_pb2.OutputOptions(
                logprobs=request.logprobs, include_special_tokens=request.include_special_tokens
            ),
            disconnect=_disconnect(request),
            timeout=duration_to_proto(timeout_s),
        )
        _set_prompt(generation, request)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"an option has a type or a range that the contract does not know: {error}"
        ) from error
    return generation


def _disconnect(request: GenerationRequest) -> generation_pb2.Disconnect:
    if not request.detach:
        return generation_pb2.Disconnect(mode=generation_pb2.DISCONNECT_MODE_CANCEL)
    retention = None if request.retention_s is None else duration_to_proto(request.retention_s)
    return generation_pb2.Disconnect(mode=generation_pb2.DISCONNECT_MODE_DETACH, retention=retention)


def priority_to_proto(priority: str) -> generation_pb2.Priority.ValueType:
    """Raises InvalidArgument for a name that is none of the three."""
    if priority not in _PRIORITIES:
        raise invalid_field("priority", f'must be "low", "normal" or "high"; got {priority!r}')
    return _PRIORITIES[priority]


def duration_to_proto(seconds: float) -> duration_pb2.Duration:
    """Seconds as the contract has them."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def _set_prompt(generation: generation_pb2.Generation, request: GenerationRequest) -> None:
    given = [request.prompt is not None, request.messages is not None, request.token_ids is not None]
    if sum(given) != 1:
        raise invalid_field("prompt", f"give exactly one of prompt, messages and token_ids; got {sum(given)}")
    if request.prompt is not None:
        generation.text = request.prompt
    elif request.messages is not None:
        chat = generation_pb2.Chat(
            messages=[_message(message) for message in request.messages],
            add_generation_prompt=request.add_generation_prompt,
        )
        if request.template_arguments:
            chat.template_arguments_json = json.dumps(dict(request.template_arguments))
        generation.chat.CopyFrom(chat)
    else:
        generation.token_ids.CopyFrom(
            generation_pb2.TokenIds(ids=request.token_ids or (), tokenizer_digest=request.tokenizer_digest)
        )


def _message(message: Message | Mapping[str, str]) -> generation_pb2.ChatMessage:
    if isinstance(message, Message):
        return generation_pb2.ChatMessage(role=message.role, content=message.content)
    return generation_pb2.ChatMessage(**message)


def prompt_from_proto(started: generation_pb2.Started) -> Prompt:
    """The prompt's facts."""
    return Prompt(
        request_id=started.request_id,
        model_digest=started.artifact_digest,
        profile=started.profile,
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens,
        seed=started.seed,
        tokenizer_digest=started.tokenizer_digest,
    )


def chunk_from_proto(delta: generation_pb2.TokenDelta, cursor: str) -> Chunk:
    """The tokens of one message."""
    return Chunk(
        choice=delta.choice,
        index=delta.index,
        token_ids=tuple(delta.token_ids),
        text=delta.text,
        logprobs=_logprobs(delta.logprobs),
        cursor=cursor,
    )


def _logprobs(entries: Iterable[generation_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(entry.logprob, {best.token_id: best.logprob for best in entry.top}) for entry in entries
    )


def answer_from_proto(response: inference_pb2.GenerateResponse) -> Answer:
    """A whole answer."""
    return Answer(
        prompt=prompt_from_proto(response.started),
        choices=tuple(
            Choice(
                index=choice.index,
                text=choice.text,
                token_ids=tuple(choice.token_ids),
                logprobs=_logprobs(choice.logprobs),
                finish_reason=_FINISH_REASONS.get(choice.finish_reason, ""),
                stop_string=choice.stop_string,
                stop_token_id=choice.stop_token_id if choice.HasField("stop_token_id") else None,
            )
            for choice in response.choices
        ),
        usage=_usage(response.usage),
    )


def answer_from_chunks(prompt: Prompt, chunks: Sequence[Chunk], finished: generation_pb2.Finished) -> Answer:
    """The whole answer that a stream's chunks make."""
    choices = []
    for finish in finished.choices:
        own = [chunk for chunk in chunks if chunk.choice == finish.choice]
        choices.append(
            Choice(
                index=finish.choice,
                text="".join(chunk.text for chunk in own),
                token_ids=tuple(token for chunk in own for token in chunk.token_ids),
                logprobs=tuple(entry for chunk in own for entry in chunk.logprobs),
                finish_reason=_FINISH_REASONS.get(finish.finish_reason, ""),
                stop_string=finish.stop_string,
                stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
            )
        )
    return Answer(prompt, tuple(choices), _usage(finished.usage))


def _usage(usage: generation_pb2.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)


def served_model_from_proto(model: inference_pb2.ServedModel) -> ServedModel:
    """A model of the list."""
    return ServedModel(
        name=model.model,
        digest=model.artifact_digest,
        profile=model.profile,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        ready_workers=model.ready_workers,
        error=model.error.message,
        tasks=tuple(model.tasks),
        labels=tuple(model.labels),
        embedding_dimensions=model.embedding_dimensions,
        prompt_names=tuple(model.prompt_names),
    )
