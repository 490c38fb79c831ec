"""The services that the gateway calls, behind plain interfaces: the registry and the tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from treadle.rpc import from_rpc_error
from treadle_gateway.generation import ChatPrompt

T = TypeVar("T")

_PAGE = 500


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's folder says of sampling; None: nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Artifact:
    """What the gateway needs to know of a model in the store."""

    digest: str
    compute_digest: str
    tokenizer_digest: str
    vocab_size: int
    context_length: int
    defaults: GenerationDefaults


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as ids, and the digest of the tokenizer that made them."""

    ids: tuple[int, ...]
    tokenizer_digest: str


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
        ),
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
