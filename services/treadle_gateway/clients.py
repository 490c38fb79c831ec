"""The services that the gateway calls, behind plain interfaces: the registry and the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from treadle.errors import Internal
from treadle.rpc import from_rpc_error
from treadle_gateway.artifact import DECODER_TASKS, Artifact, GenerationDefaults, TaskFacts
from treadle_gateway.encoded import Cut, EncodedText, EncodedTexts, EncodeOptions, Texts, Tokenized
from treadle_gateway.generation import ChatPrompt

T = TypeVar("T")

_PAGE = 500


class Registry(Protocol):
    """Names to artifacts. Every call raises TreadleError."""

    async def resolve(self, model: str, *, timeout_s: float) -> Artifact:
        """The artifact that an alias or digest means now; raises NotFound."""

    def aliases(self, *, timeout_s: float) -> AsyncIterator[tuple[str, str]]:
        """Every alias with the digest of its artifact."""


class Tokenizer(Protocol):
    """Prompts to ids. Every call raises TreadleError; fields are named as the tokenizer names them."""

    async def encode(self, model: str, text: str, *, timeout_s: float) -> Tokenized:
        """Encodes a text, with the special tokens that the model starts with."""

    async def render_chat(self, model: str, chat: ChatPrompt, *, timeout_s: float) -> Tokenized:
        """Renders messages with the model's template, and encodes the prompt."""

    async def encode_texts(
        self, model: str, texts: Texts, options: EncodeOptions, *, timeout_s: float
    ) -> EncodedTexts:
        """Encodes many texts and pairs at once."""


async def _called(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


class GrpcRegistry:
    """The registry over gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)

    async def resolve(self, model: str, *, timeout_s: float) -> Artifact:
        """See Registry."""
        request = registry_pb2.ResolveModelRequest(model=model)
        response = await _called(self._stub.ResolveModel(request, timeout=timeout_s))
        return _artifact(response.artifact)

    async def aliases(self, *, timeout_s: float) -> AsyncIterator[tuple[str, str]]:
        """See Registry."""
        token = ""
        while True:
            request = registry_pb2.ListAliasesRequest(page_size=_PAGE, page_token=token)
            response = await _called(self._stub.ListAliases(request, timeout=timeout_s))
            for alias in response.aliases:
                yield alias.name, alias.artifact_digest
            token = response.next_page_token
            if not token:
                return


class GrpcTokenizer:
    """The tokenizer over gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)

    async def encode(self, model: str, text: str, *, timeout_s: float) -> Tokenized:
        """See Tokenizer."""
        request = tokenizer_pb2.EncodeRequest(model=model, inputs=[tokenizer_pb2.EncodeInput(text=text)])
        response = await _called(self._stub.Encode(request, timeout=timeout_s))
        ids: Sequence[int] = response.encodings[0].ids if response.encodings else ()
        return Tokenized(tuple(ids), response.tokenizer_digest)

    async def render_chat(self, model: str, chat: ChatPrompt, *, timeout_s: float) -> Tokenized:
        """See Tokenizer."""
        request = tokenizer_pb2.RenderChatRequest(
            model=model,
            messages=[
                tokenizer_pb2.Message(role=message.role, content=message.content) for message in chat.messages
            ],
            add_generation_prompt=chat.add_generation_prompt,
            template_arguments_json=chat.template_arguments_json,
            tokenize=True,
        )
        response = await _called(self._stub.RenderChat(request, timeout=timeout_s))
        return Tokenized(tuple(response.ids), response.tokenizer_digest)

    async def encode_texts(
        self, model: str, texts: Texts, options: EncodeOptions, *, timeout_s: float
    ) -> EncodedTexts:
        """See Tokenizer."""
        request = tokenizer_pb2.EncodeRequest(
            model=model,
            inputs=[tokenizer_pb2.EncodeInput(text=text, pair=pair) for text, pair in texts],
            add_special_tokens=options.add_special_tokens,
            truncation=None if options.cut is None else _truncation(options.cut),
            return_offsets=options.offsets,
            return_word_ids=options.offsets,
            return_type_ids=options.type_ids,
            return_special_tokens_mask=options.special_tokens,
        )
        response = await _called(self._stub.Encode(request, timeout=timeout_s))
        if len(response.encodings) != len(texts):
            raise Internal(
                f"the tokenizer was asked for {len(texts)} texts and answered {len(response.encodings)}"
            )
        # Offsets are an object each.
        rows = (
            await asyncio.to_thread(_rows, response, options) if options.offsets else _rows(response, options)
        )
        return EncodedTexts(rows, response.tokenizer_digest)


def _truncation(cut: Cut) -> tokenizer_pb2.Truncation:
    return tokenizer_pb2.Truncation(
        max_length=cut.max_length,
        strategy=(
            tokenizer_pb2.TRUNCATION_STRATEGY_ONLY_SECOND
            if cut.second_only
            else tokenizer_pb2.TRUNCATION_STRATEGY_LONGEST_FIRST
        ),
    )


def _rows(response: tokenizer_pb2.EncodeResponse, options: EncodeOptions) -> list[EncodedText]:
    return [_encoded(one, options) for one in response.encodings]


def _encoded(message: tokenizer_pb2.Encoding, options: EncodeOptions) -> EncodedText:
    """The lists stay the message's own, so that nothing is copied token by token."""
    encoded = EncodedText(
        ids=message.ids,
        type_ids=message.type_ids,
        starts=[offset.start for offset in message.offsets],
        ends=[offset.end for offset in message.offsets],
        word_ids=message.word_ids,
        special=message.special_tokens_mask,
    )
    count = len(encoded.ids)
    for wanted, lists in (
        (options.type_ids, [encoded.type_ids]),
        (options.offsets, [encoded.starts, encoded.word_ids]),
        (options.special_tokens, [encoded.special]),
    ):
        if wanted and any(len(one) != count for one in lists):
            raise Internal("the tokenizer's answer lacks what was asked for; is it of an older version?")
    return encoded


def _artifact(message: artifact_pb2.Artifact) -> Artifact:
    defaults = message.generation_defaults

    def default(name: str) -> float | None:
        return getattr(defaults, name) if defaults.HasField(name) else None  # type: ignore[arg-type]

    top_k = defaults.top_k if defaults.HasField("top_k") else None
    return Artifact(
        digest=message.digest,
        compute_digest=message.compute_digest,
        tokenizer_digest=message.tokenizer_digest,
        vocab_size=message.facts.vocab_size,
        context_length=message.facts.context_length,
        defaults=GenerationDefaults(
            temperature=default("temperature"),
            top_k=top_k,
            top_p=default("top_p"),
            min_p=default("min_p"),
            repetition_penalty=default("repetition_penalty"),
            eos_token_ids=tuple(defaults.eos_token_ids),
            bos_token_id=defaults.bos_token_id if defaults.HasField("bos_token_id") else None,
        ),
        model_type=message.facts.model_type,
        facts=_task_facts(message.task_facts),
    )


def _task_facts(message: artifact_pb2.TaskFacts) -> TaskFacts:
    return TaskFacts(
        # Of an artifact that was imported before there were others nothing is said.
        tasks=tuple(message.tasks) or DECODER_TASKS,
        pooling=message.pooling,
        normalize=message.normalize,
        embedding_dimensions=message.embedding_dimensions,
        prompts=dict(message.prompts),
        default_prompt_name=message.default_prompt_name,
        skip_prompt=message.skip_prompt,
        labels=tuple(message.labels),
        multi_label=message.multi_label,
        rank_activation=message.rank_activation,
        similarity=message.similarity,
        max_input_tokens=message.max_input_tokens,
    )


HEALTH_TIMEOUT_S = 2.0


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Whether the service behind a channel says that it is ready."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
