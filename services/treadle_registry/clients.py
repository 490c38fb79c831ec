"""Other registries that this one takes models from, over gRPC, behind plain methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import grpc

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    TreadleError,
    Unauthenticated,
    Unavailable,
)
from treadle.models.stored_folder import StoredFile
from treadle.rpc import open_channel
from treadle.security import Credentials
from treadle.transfer.download import Progress, Target, checked_path, download_targets
from treadle.transfer.retries import Retries
from treadle_registry.names import is_digest
from treadle_registry.servicing.convert_derivation import derivation_from_proto
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.digests import Digests
from treadle_registry.store.manifest import DtypeShare, ModelFacts
from treadle_registry.store.task_facts import TaskFacts, decoder_facts

_TIMEOUT_S = 10.0
_TRIES = 6
_MAX_FILES = 2048
_MAX_TEXT = 1000
_MAX_PATH = 200
_MAX_DTYPES = 64
_MAX_DTYPE = 32
_MAX_TASKS = 64
_MAX_LABELS = 10_000
_MAX_BYTES = 1 << 40
_END_OF_TIME_S = 253_402_300_800
"""The year 10000, which no timestamp reaches."""


@dataclass(frozen=True, slots=True)
class RemoteArtifact:
    """What another registry says of a model: nothing of it is believed before it was looked at."""

    digests: Digests
    files: tuple[StoredFile, ...]
    source_files: tuple[StoredFile, ...]
    facts: ModelFacts
    source: str
    converter: str
    create_time: float
    parent_digest: str = ""
    derivation: Derivation | None = None
    """How it was made of its parent; None: it was imported."""
    task_facts: TaskFacts = field(default_factory=TaskFacts)

    @property
    def different_files(self) -> list[StoredFile]:
        """Each content once."""
        return list({file.digest: file for file in (*self.files, *self.source_files)}.values())


@dataclass(frozen=True, slots=True)
class Remote:
    """A registry of the settings."""

    name: str
    address: str
    credentials: Credentials

    async def resolve(self, model: str) -> RemoteArtifact:
        """What `model` is there; raises NotFound, Unavailable (REMOTE_UNAVAILABLE), PermissionDenied
        (REMOTE_DENIED), and DataLoss (BAD_REMOTE_ARTIFACT) for an answer that cannot be."""
        request = registry_pb2.ResolveModelRequest(model=model)
        async with open_channel(self.address, self.credentials) as channel:
            stub, retries = registry_pb2_grpc.RegistryServiceStub(channel), Retries(_TRIES)
            while True:
                try:
                    response = await stub.ResolveModel(request, timeout=_TIMEOUT_S)
                    break
                except grpc.aio.AioRpcError as error:
                    try:
                        await retries.pause(error)
                    except TreadleError as failure:
                        raise self._said(failure) from error
        return _artifact(response.artifact)

    async def fetch(self, targets: Iterable[Target], progress: Progress) -> int:
        """Brings files here, going on with what was begun; gives the bytes that came. Raises as `resolve`
        does, and DataLoss for content that is not what its digest says."""
        async with open_channel(self.address, self.credentials) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            try:
                return await download_targets(stub, targets, progress=progress)
            except (Unavailable, NotFound, Unauthenticated, PermissionDenied) as failure:
                raise self._said(failure) from failure

    def _said(self, failure: TreadleError) -> TreadleError:
        """The failure, as one of the other registry."""
        if isinstance(failure, Unauthenticated | PermissionDenied):
            return PermissionDenied(
                f"the registry {self.name!r} does not let this one in: {failure.message}; give its key in "
                "TREADLE_REGISTRY_REMOTE_KEYS",
                reason="REMOTE_DENIED",
            )
        if isinstance(failure, Unavailable):
            return Unavailable(
                f"the registry {self.name!r} cannot be reached: {failure.message}; what has come stays for a "
                "day: import again",
                reason="REMOTE_UNAVAILABLE",
                retry_after_s=failure.retry_after_s,
            )
        return type(failure)(
            f"the registry {self.name!r} says: {failure.message}",
            reason=failure.reason,
            metadata=failure.metadata,
        )


def _artifact(message: artifact_pb2.Artifact) -> RemoteArtifact:
    digests = Digests(message.compute_digest, message.tokenizer_digest, message.presentation_digest)
    for digest in (digests.compute, digests.tokenizer, digests.presentation, message.digest):
        _need(is_digest(digest), f"a digest {digest[:100]!r}")
    _need(digests.artifact == message.digest, f"{message.digest}, which its parts do not make")
    create_time = message.create_time.seconds + message.create_time.nanos / 1e9
    _need(0 <= create_time < _END_OF_TIME_S, f"the time {create_time:g}")
    derivation = _derivation(message)
    return RemoteArtifact(
        digests=digests,
        files=_files(message.files),
        # A derived one has at most an adapter's.
        source_files=_files(message.source_files, least=0 if derivation else 1),
        facts=_facts(message.facts),
        source=_text(message.source),
        converter=_text(message.converter),
        create_time=create_time,
        parent_digest=message.parent_digest,
        derivation=derivation,
        task_facts=_task_facts(message),
    )


def _derivation(message: artifact_pb2.Artifact) -> Derivation | None:
    derived = message.HasField("derivation")
    _need(derived == bool(message.parent_digest), "a derivation without its parent, or a parent without it")
    if not derived:
        return None
    _need(is_digest(message.parent_digest), f"a parent {message.parent_digest[:100]!r}")
    _need(message.parent_digest != message.digest, "an artifact that was made of itself")
    try:
        derivation = derivation_from_proto(message.derivation)
        derivation.check()
    except InvalidArgument as error:
        raise _bad(f"a derivation that is none: {error.message[:_MAX_TEXT]}") from error
    if derivation.kind == "adapter_merge":
        digest = message.derivation.adapter_merge.digest
        _need(is_digest(digest), f"an adapter {digest[:100]!r}")
        return Derivation(derivation.kind, digest, _text(derivation.folder))
    return derivation


def _facts(facts: artifact_pb2.ModelFacts) -> ModelFacts:
    _need(len(facts.dtypes) <= _MAX_DTYPES, f"{len(facts.dtypes)} types of weights")
    return ModelFacts(
        model_type=_text(facts.model_type),
        architecture=_text(facts.architecture),
        parameters=facts.parameters,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        license=_text(facts.license)[:100],
        has_chat_template=facts.has_chat_template,
        dtypes=tuple(
            DtypeShare(_text(share.dtype)[:_MAX_DTYPE], share.parameters, share.bytes)
            for share in facts.dtypes
        ),
        quantization=_text(facts.quantization),
    )


def _task_facts(message: artifact_pb2.Artifact) -> TaskFacts:
    """What people are told before it is here; then the files say it."""
    facts = message.task_facts
    if not facts.tasks:
        # A registry from before there were others.
        return decoder_facts(message.facts.context_length)
    _need(max(len(facts.tasks), len(facts.prompts)) <= _MAX_TASKS, f"{len(facts.tasks)} tasks")
    _need(len(facts.labels) <= _MAX_LABELS, f"{len(facts.labels)} labels")
    return TaskFacts(
        tasks=tuple(map(_text, facts.tasks)),
        pooling=_text(facts.pooling),
        normalize=facts.normalize,
        embedding_dimensions=facts.embedding_dimensions,
        prompts={_text(name): _text(prompt) for name, prompt in facts.prompts.items()},
        default_prompt_name=_text(facts.default_prompt_name),
        skip_prompt=facts.skip_prompt,
        labels=tuple(map(_text, facts.labels)),
        multi_label=facts.multi_label,
        rank_activation=_text(facts.rank_activation),
        similarity=_text(facts.similarity),
        max_input_tokens=facts.max_input_tokens,
    )


def _text(text: str) -> str:
    """What people are shown, on terminals too."""
    return "".join(mark if mark.isprintable() else "?" for mark in text[:_MAX_TEXT])


def _files(messages: Sequence[artifact_pb2.ArtifactFile], least: int = 1) -> tuple[StoredFile, ...]:
    _need(least <= len(messages) <= _MAX_FILES, f"{len(messages)} files")
    paths = {message.path for message in messages}
    _need(len(paths) == len(messages), "a file twice")
    for message in messages:
        path = PurePosixPath(checked_path(message.path))
        plain = str(path) == message.path and len(path.parts) <= 2 and len(message.path) <= _MAX_PATH
        _need(plain and str(path.parent) not in paths, f"the path {message.path[:100]!r}")
        _need(is_digest(message.digest), f"a digest {message.digest[:100]!r} of {message.path[:100]!r}")
        _need(message.bytes <= _MAX_BYTES, f"{message.bytes} bytes of {message.path[:100]!r}")
    return tuple(StoredFile(message.path, message.digest, message.bytes) for message in messages)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise _bad(what)


def _bad(what: str) -> DataLoss:
    return DataLoss(f"the other registry lists {what}", reason="BAD_REMOTE_ARTIFACT")
