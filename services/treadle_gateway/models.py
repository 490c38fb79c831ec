"""Which artifact a model's name means, and which profile of it is ready.

Names are followed by the registry's watch, and asked for where it has said nothing; the gateway goes on with
what it knows while the registry is away. Readiness comes from the workers' heartbeats in Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from treadle.deployments import KnownModels, ServingConfiguration, Target
from treadle.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    TreadleError,
    Unavailable,
    invalid_field,
)
from treadle.models.remembered import RememberedNames
from treadle_gateway.artifact import Artifact
from treadle_gateway.clients import Registry
from treadle_gateway.routing import routes

ARTIFACT_FRESH_S = 2.0
"""How long an alias that is not watched is taken to mean what it meant."""
DIGEST_FRESH_S = 300.0
"""How long a digest is not asked for again: it never means anything else, but may be deleted."""
READY_FRESH_S = 0.5
NOT_SERVED_RETRY_S = 2.0
MAX_CACHED = 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """A profile on one worker, from its heartbeat."""

    profile: str
    artifact_digest: str
    compute_digest: str
    tokenizer_digest: str
    model_name: str
    max_model_len: int
    vocab_size: int
    ready: bool
    error: TreadleError | None = None
    """Why the worker could not load it."""
    worker: str = ""
    """Its consumer's name."""
    configuration: ServingConfiguration = field(default_factory=ServingConfiguration)
    """Complete."""

    def serves(self, artifact: Artifact) -> bool:
        """Whether it answers for the artifact: equal numbers and equal ids; the template may differ."""
        return (self.compute_digest, self.tokenizer_digest) == (
            artifact.compute_digest,
            artifact.tokenizer_digest,
        )


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An artifact with the profile that will answer and what all its workers can take."""

    artifact: Artifact
    profile: str
    max_model_len: int
    """Prompt and answer together, in tokens."""
    vocab_size: int
    """The logits' width."""
    ready_workers: int


def _bound(values: Sequence[int]) -> int:
    """The smallest of what is known; 0 is "not said"."""
    return min((value for value in values if value > 0), default=0)


class ArtifactCache:
    """Names to artifacts: fresh for a while, and kept when the registry is away."""

    def __init__(self, registry: Registry, *, timeout_s: float) -> None:
        self._registry = registry
        self._timeout_s = timeout_s
        self._names = RememberedNames(self._ask, fresh_s=ARTIFACT_FRESH_S, max_names=MAX_CACHED)
        self._digests = RememberedNames(self._ask, fresh_s=DIGEST_FRESH_S, max_names=MAX_CACHED)

    async def resolve(self, name: str) -> Artifact:
        """The artifact; raises NotFound and InvalidArgument naming the field, and Unavailable when it cannot
        be known."""
        try:
            return await self._remembered(name).get(name)
        except NotFound as error:
            raise NotFound(
                f"no model {name!r} is known; ListModels lists what is served",
                reason="MODEL_NOT_FOUND",
                fields=[FieldViolation("generation.model", "names no alias and no artifact of the store")],
            ) from error
        except InvalidArgument as error:
            description = error.fields[0].description if error.fields else error.message
            raise invalid_field(
                "generation.model", f"{description}. ListModels lists what is served"
            ) from error
        except (Unavailable, DeadlineExceeded) as error:
            raise Unavailable(
                "the registry is away, and the model is not known yet; try again",
                reason="REGISTRY_UNAVAILABLE",
                retry_after_s=1.0,
            ) from error

    async def _ask(self, name: str) -> Artifact:
        try:
            return await self._registry.resolve(name, timeout_s=self._timeout_s)
        except NotFound:
            self._remembered(name).forget(name)
            raise

    def _remembered(self, name: str) -> RememberedNames[Artifact]:
        return self._digests if name.startswith("sha256:") else self._names

    def forget(self, name: str) -> None:
        """The registry has said that the name is gone."""
        self._remembered(name).forget(name)

    async def close(self) -> None:
        """Ends what is still being asked."""
        await self._names.close()
        await self._digests.close()


class Models:
    """Which model answers a request."""

    def __init__(
        self,
        artifacts: ArtifactCache,
        read_loaded: Callable[[], Awaitable[list[Loaded]]],
        known: Callable[[], KnownModels | None] = lambda: None,
    ) -> None:
        """`read_loaded` gives every living worker's profiles; it raises Unavailable. `known` is what the
        registry's watch has said."""
        self._artifacts = artifacts
        self._known = known
        self._read_loaded = read_loaded
        self._loaded: list[Loaded] = []
        self._loaded_at = -math.inf
        self._reading = asyncio.Lock()

    async def find(self, name: str, profile: str = "", request_id: str = "") -> ServedModel:
        """The model that will answer; of a deployment with two artifacts the id draws one.

        Raises NotFound for an unknown name, Unavailable (MODEL_NOT_SERVED) where nobody has it ready,
        DataLoss (DAMAGED_FILE) where that is so because its files are damaged, and FailedPrecondition
        (PROFILE_NOT_SERVED) where others of its profiles are served, but not `profile`.
        """
        began = time.monotonic()
        targets = routes(self._known(), name, request_id) or [Target(name)]
        # Who leads to a model that has just become ready was told so after the heartbeat that says it.
        for not_before in (began - READY_FRESH_S, began):
            loaded = await self.loaded(not_before)
            having: list[Loaded] = []
            for target in targets:
                artifact = await self._artifact(target, targets)
                if artifact is None:
                    continue
                able = [one for one in loaded if _answers(one, target, artifact)]
                having += able
                ready = [one for one in able if one.ready and profile in ("", one.profile)]
                if ready:
                    return _served(artifact, ready)
        if profile:
            _check_profile(name, profile, having)
        raise _not_served(name, having)

    async def _artifact(self, target: Target, targets: Sequence[Target]) -> Artifact | None:
        """What the target names; None where it cannot be known, but there are others."""
        try:
            return await self._artifacts.resolve(target.artifact_digest)
        except TreadleError:
            if len(targets) == 1:
                raise
            return None

    async def of(self, artifact_digest: str, profile: str) -> ServedModel:
        """An artifact as a profile of it serves it, or did: what a result that is there was computed with."""
        artifact = await self._artifacts.resolve(artifact_digest)
        having = [one for one in await self.loaded() if one.profile == profile and one.serves(artifact)]
        if having:
            return _served(artifact, having)
        return ServedModel(artifact, profile, artifact.context_length, artifact.vocab_size, 0)

    async def artifacts(self, digests: Iterable[str]) -> dict[str, Artifact]:
        """What is known of these artifacts; what cannot be known is left out."""
        wanted = list(dict.fromkeys(digests))
        found = await asyncio.gather(*map(self._known_artifact, wanted))
        return {digest: one for digest, one in zip(wanted, found, strict=True) if one is not None}

    async def _known_artifact(self, digest: str) -> Artifact | None:
        with contextlib.suppress(TreadleError):
            return await self._artifacts.resolve(digest)
        return None

    async def is_ready(self, model: ServedModel) -> bool:
        """Whether anybody has the model ready still."""
        return any(one.ready and one.profile == model.profile for one in await self.loaded())

    async def watched(self, known: KnownModels, alias: str) -> None:
        """Learns what an alias (empty: every deployed one) leads to, while the registry can be asked."""
        names = [alias] if alias else list(known.deployments)[:MAX_CACHED]
        digests = []
        if alias in known.aliases:
            digests.append(known.aliases[alias])
        elif alias:
            self._artifacts.forget(alias)
        for name in names:
            if name in known.deployments:
                digests += [target.artifact_digest for target in known.deployments[name].concerned]
        for digest in dict.fromkeys(digests):
            with contextlib.suppress(TreadleError):
                await self._artifacts.resolve(digest)

    async def loaded(self, not_before: float | None = None) -> list[Loaded]:
        """Every living worker's profiles, read no sooner than that (monotonic); None: READY_FRESH_S ago."""
        if not_before is None:
            not_before = time.monotonic() - READY_FRESH_S
        async with self._reading:
            if self._loaded_at < not_before:
                began = time.monotonic()
                self._loaded = await self._read_loaded()
                self._loaded_at = began
            return self._loaded


def _answers(loaded: Loaded, target: Target, artifact: Artifact) -> bool:
    return loaded.serves(artifact) and target.configuration.met_by(loaded.configuration)


def _not_served(name: str, loaded: Sequence[Loaded]) -> TreadleError:
    """Why nobody answers. Damaged files stay so until somebody acts: no client should try again."""
    errors = [one.error for one in loaded if one.error is not None]
    if errors and len(errors) == len(loaded) and isinstance(errors[0], DataLoss):
        # A fresh one: an exception that is raised again and again gathers tracebacks.
        return DataLoss(errors[0].message, reason=errors[0].reason, metadata=errors[0].metadata)
    why = f" ({errors[0].message})" if errors else ""
    return Unavailable(
        f"no worker has model {name!r} ready{why}; try again, or start one that serves it",
        reason="MODEL_NOT_SERVED",
        retry_after_s=NOT_SERVED_RETRY_S,
    )


def _check_profile(name: str, profile: str, loaded: Sequence[Loaded]) -> None:
    if loaded and profile not in {one.profile for one in loaded}:
        served = ", ".join(sorted({one.profile for one in loaded}))
        raise FailedPrecondition(
            f"model {name!r} is served as {served}, not as {profile!r}; name one of these, or none",
            reason="PROFILE_NOT_SERVED",
            fields=[FieldViolation("generation.profile", f"must be one of {served}, or empty")],
        )


def _served(artifact: Artifact, ready: Sequence[Loaded]) -> ServedModel:
    """The artifact as most workers serve it."""
    names = [one.profile for one in ready]
    chosen = max(sorted(set(names)), key=names.count)
    # A worker says for each artifact that it serves with one engine that it does.
    workers = list({one.worker: one for one in ready if one.profile == chosen}.values())
    return ServedModel(
        artifact=artifact,
        profile=workers[0].profile,
        max_model_len=_bound([artifact.context_length, *(worker.max_model_len for worker in workers)]),
        vocab_size=_bound([artifact.vocab_size, *(worker.vocab_size for worker in workers)]),
        ready_workers=len(workers),
    )
