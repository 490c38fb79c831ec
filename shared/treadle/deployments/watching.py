"""Follows the registry's aliases and deployments, across restarts of the registry and broken connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import grpc

from treadle.api.registry.v1 import deployment_pb2, registry_pb2, registry_pb2_grpc
from treadle.deployments.deployment import Deployment, ServingConfiguration, Target
from treadle.deployments.known import KnownModels
from treadle.errors import TreadleError, Unavailable
from treadle.rpc import from_rpc_error

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_SILENT_S = 90.0
"""The registry says every 30 s that nothing is new: one that says nothing for so long is not there."""
_QUIET = ("UNAVAILABLE", "UNIMPLEMENTED", "CANCELLED")
"""How a stream ends while the registry is away, is older than this, or restarts."""

Change = registry_pb2.WatchModelsResponse
Watch = Callable[[str], AsyncGenerator[Change, None]]
"""Changes after a version; raises TreadleError."""


class ModelWatch:
    """`run` is a task. While the registry is away, what was known stays known."""

    def __init__(
        self, watch: Watch, changed: Callable[[KnownModels, str], Awaitable[None]] | None = None
    ) -> None:
        """`changed` is told of which alias there is news, or "" for all at once; the watch waits for it."""
        self._watch = watch
        self._changed = changed
        self.known: KnownModels | None = None
        """None until the registry has said all of it once."""
        self.asked = asyncio.Event()
        """Set once the registry has answered, or could not be asked."""
        self._version = ""
        self._incoming: KnownModels | None = None
        """The whole state, as far as it has been said."""
        self._said = ""

    async def run(self) -> None:
        """Follows for ever."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                async with contextlib.aclosing(self._watch(self._version)) as changes:
                    while True:
                        change = await _next(changes)
                        pause_s = _FIRST_PAUSE_S
                        await self._take(change)
            except TreadleError as error:
                self._say(error)
            except Exception:
                # Whoever follows must not be left behind for good; what it missed comes with the whole state.
                logger.exception("a change of the registry's models could not be taken")
                self._version = ""
            self.asked.set()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _say(self, error: TreadleError) -> None:
        if error.reason != self._said:
            level = logging.INFO if error.code in _QUIET else logging.WARNING
            logger.log(level, "the registry is not watched now", extra={"reason": error.reason})
        self._said = error.reason

    async def _take(self, change: Change) -> None:
        self._said = ""
        match change.WhichOneof("change"):
            case "reset":
                self._incoming = KnownModels()
                # Cut off before it is complete, it has to be said from its beginning.
                self._version = ""
            case "complete":
                if self._incoming is not None:
                    self.known, self._incoming = self._incoming, None
                self._version = change.version
                await self._tell("")
                self.asked.set()
            case _:
                await self._apply(change)

    async def _apply(self, change: Change) -> None:
        models = self.known if self._incoming is None else self._incoming
        if models is None:
            raise Unavailable("a change of nothing known", reason="WATCH_OUT_OF_ORDER")
        name = _alias(change)
        before = models.aliases.get(name), models.deployments.get(name)
        match change.WhichOneof("change"):
            case "alias":
                models.set_alias(name, change.alias.artifact_digest)
            case "deleted_alias":
                models.delete_alias(name)
            case "deployment":
                models.set_deployment(to_deployment(change.deployment))
            case "deleted_deployment":
                models.delete_deployment(name)
        if self._incoming is None:
            self._version = change.version
            # How far the workers are changes often, and nothing of that is kept here.
            if before != (models.aliases.get(name), models.deployments.get(name)):
                await self._tell(name)

    async def _tell(self, name: str) -> None:
        if self._changed is not None and self.known is not None:
            await self._changed(self.known, name)


async def _next(changes: AsyncGenerator[Change, None]) -> Change:
    try:
        async with asyncio.timeout(_SILENT_S):
            return await anext(changes)
    except TimeoutError:
        raise Unavailable(f"the registry was silent for {_SILENT_S:.0f} s", reason="WATCH_SILENT") from None
    except StopAsyncIteration:
        raise Unavailable("the registry ended the watch", reason="WATCH_ENDED") from None


def _alias(change: Change) -> str:
    """Whose change it is; empty for one of a later contract."""
    match change.WhichOneof("change"):
        case "alias":
            return change.alias.name
        case "deployment":
            return change.deployment.alias
        case _:
            return change.deleted_alias or change.deleted_deployment


def watch_models(channel: grpc.aio.Channel) -> Watch:
    """The watch of the registry behind a channel that the caller closes."""
    stub = registry_pb2_grpc.RegistryServiceStub(channel)

    async def watch(version: str) -> AsyncGenerator[Change, None]:
        call = stub.WatchModels(registry_pb2.WatchModelsRequest(version=version))
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    return watch


def to_deployment(message: deployment_pb2.Deployment) -> Deployment:
    """A deployment in plain Python."""
    return Deployment(
        message.alias,
        tuple(map(_target, message.targets)),
        tuple(map(_target, message.serving)),
        message.replicas or 1,
        tuple(message.warm_up_prompts),
    )


def _target(message: deployment_pb2.DeploymentTarget) -> Target:
    asked = message.configuration
    configuration = ServingConfiguration(asked.dtype, asked.quantization, asked.cache_dtype)
    return Target(message.artifact_digest, configuration, message.weight)
