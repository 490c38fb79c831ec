"""The models that this worker serves, as what is wanted changes: taken up, shared, let go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from redis.asyncio import Redis

from treadle.deployments import Deployment, KnownModels, ModelWatch, ServingConfiguration
from treadle.errors import FailedPrecondition, TreadleError
from treadle_worker.config import EngineConfig, WorkerConfig
from treadle_worker.engine_protocol import Ready
from treadle_worker.jobs import Artifact
from treadle_worker.models.configuration import complete, filled
from treadle_worker.models.holding import Holding
from treadle_worker.models.model_host import ModelHost
from treadle_worker.models.names import NamedModels
from treadle_worker.models.registry import Registry
from treadle_worker.models.retirement import retire
from treadle_worker.models.surplus import Surplus
from treadle_worker.models.taking_up import TakingUp
from treadle_worker.models.wanted import Claim, to_take_up, wanted

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0

HostKey = tuple[str, str, ServingConfiguration]
"""Compute digest, tokenizer digest, configuration: artifacts that differ in less share an engine."""
MakeHost = Callable[[Claim, Artifact, EngineConfig], ModelHost]


class ServedModels:
    """`run` is a task."""

    def __init__(
        self,
        config: WorkerConfig,
        engine_config: EngineConfig,
        registry: Registry,
        watch: ModelWatch,
        redis: Redis,
        consumer: str,
        make_host: MakeHost,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when the heartbeat has something else to say."""
        self._config = config
        self._engine_config = engine_config
        self._registry = registry
        self._watch = watch
        self._redis = redis
        self._consumer = consumer
        self._make_host = make_host
        self._changed = changed
        self._named = NamedModels(config.models, watch, registry, self.wake)
        self._surplus = Surplus(registry, redis, consumer)
        self._taking_up = TakingUp(self._candidates, self._take_up)
        self._woken = asyncio.Event()
        self._encoders: set[str] = set()
        """Digests of artifacts that proved to be encoders. A model is taken for a decoder until it is known;
        then its claim may be another, with the dtype that "auto" means for it."""
        self._claims: list[Claim] = []
        self._holdings: dict[Claim, Holding] = {}
        self._hosts: dict[HostKey, ModelHost] = {}
        self._tasks: dict[object, asyncio.Task[None]] = {}
        """Of holdings and hosts, while they are there."""
        self._retiring: dict[HostKey, asyncio.Task[None]] = {}
        self._group = asyncio.TaskGroup()
        self.pinned: set[str] = set()
        """Names that are served because an operator said so."""
        self.draining = False

    @property
    def hosts(self) -> list[ModelHost]:
        """Of every model that is here, also those that are let go."""
        return list(self._hosts.values())

    @property
    def holdings(self) -> list[Holding]:
        """What this worker answers for."""
        return list(self._holdings.values())

    def served(self) -> list[tuple[ModelHost, Artifact, str]]:
        """Each artifact with its host and the name that it is served under."""
        found = {
            (holding.host, holding.artifact.digest): (holding.host, holding.artifact, holding.claim.name)
            for holding in self._holdings.values()
            if holding.host is not None and holding.artifact is not None
        }
        return list(found.values())

    @property
    def state(self) -> str:
        """ "loading" until it is known of every named model whether it can be served; then "ready", or
        "failed" where none can."""
        states = {self._state_of(name) for name in self._config.models}
        if "loading" in states:
            return "loading"
        return "failed" if states == {"failed"} else "ready"

    def _state_of(self, name: str) -> str:
        states = {holding.state for claim, holding in self._holdings.items() if claim.name == name}
        if states & {"ready", "draining"}:
            return "ready"
        return "failed" if states == {"failed"} else "loading"

    def wake(self) -> None:
        """Something has changed that may change what is served, or what is said of it."""
        self._woken.set()
        for holding in self._holdings.values():
            holding.keeper.wake()

    async def pin(self, name: str) -> None:
        """Serves an alias or digest, whether or not anybody else wants it; raises what the registry says."""
        artifact = await self._registry.resolve(name)
        if name not in self._named.names:
            self._named.resolved[name] = artifact
            self._named.names.append(name)
            self.pinned.add(name)
        self.wake()

    def unpin(self, name: str) -> None:
        """Takes `pin` back."""
        if name in self.pinned:
            self.pinned.remove(name)
            self._named.names.remove(name)
            self._named.resolved.pop(name, None)
            self.wake()

    async def watched(self, known: KnownModels, alias: str) -> None:
        """The registry's watch has news of an alias; empty: of all."""
        self._taking_up.wake(alias)
        self.wake()

    def announced(self, ready: Mapping[ModelHost, Ready | None]) -> None:
        """Redis has taken a heartbeat that says of these hosts which engines they have ready."""
        for host, engine in ready.items():
            if engine is not None and host.announced is not engine:
                host.announced = engine
                self.wake()

    async def run(self) -> None:
        """Follows what is wanted, for ever; at its end every engine is stopped and every lease released."""
        try:
            async with self._group as group:
                group.create_task(self._watch.run(), name="watch")
                group.create_task(self._named.run(), name="names")
                if self._config.deployments:
                    group.create_task(self._taking_up.run(), name="taking up")
                while True:
                    self._woken.clear()
                    await self._turn()
                    await self._wait()
        finally:
            await asyncio.gather(*(holding.keeper.release() for holding in self._holdings.values()))

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_EVERY_S):
                await self._woken.wait()
        except TimeoutError:
            return

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests and no more models; returns when what runs is finished, or time is up."""
        self.draining = True
        draining = asyncio.gather(*(host.drain(timeout_s) for host in self.hosts))
        self.wake()
        await draining

    async def _turn(self) -> None:
        if self.draining:
            return
        self._claims = self._wanted()
        for claim, holding in list(self._holdings.items()):
            holding.wanted = claim in self._claims and not await self._surplus.has(
                holding, self._deployment(claim.name)
            )
        for claim in self._claims:
            if claim.required and claim not in self._holdings:
                self._hold(self._make_holding(claim))
        for holding in self._holdings.values():
            if holding.wanted and holding.artifact is not None and not holding.unservable:
                if holding.artifact.is_encoder and holding.artifact.digest not in self._encoders:
                    # That became known just now: its claim is made anew.
                    continue
                self._place(holding, holding.artifact)
        for key, host in list(self._hosts.items()):
            if any(one.wanted and one.host is host for one in self._holdings.values()):
                self._keep(key, host)
            else:
                self._let_go(key, host)
        for holding in list(self._holdings.values()):
            if not holding.wanted and (holding.host is None or not self._is_leaving(holding.host)):
                self._group.create_task(self._drop(holding), name=f"drop {holding.claim.name}")

    def _deployment(self, alias: str) -> Deployment | None:
        return None if self._watch.known is None else self._watch.known.deployments.get(alias)

    def _wanted(self) -> list[Claim]:
        found = wanted(
            self._watch.known, self._named.names, self._named.meanings, others=self._config.deployments
        )
        artifacts = [holding.artifact for holding in self._holdings.values() if holding.artifact is not None]
        artifacts += self._named.resolved.values()
        digests = {claim.artifact_digest for claim in found}
        self._encoders = self._encoders & digests | {one.digest for one in artifacts if one.is_encoder}
        # What is the same to this worker is held once: deployments may say in full what the settings say.
        return list(
            dict.fromkeys(
                filled(claim, self._engine_config, is_encoder=claim.artifact_digest in self._encoders)
                for claim in found
            )
        )

    def _candidates(self) -> list[Claim]:
        held = [claim for claim in self._holdings if not claim.required]
        limit = 0 if self.draining else self._config.max_deployed_models
        return to_take_up(self._claims, held, limit=limit)

    async def _take_up(self, claim: Claim) -> bool:
        holding = self._make_holding(claim)
        try:
            granted = await holding.keeper.tell()
        except TreadleError as error:
            logger.debug("a lease could not be asked for", extra={"reason": error.reason})
            return False
        if not granted:
            return False
        logger.info(
            "a deployment is taken up", extra={"model": claim.name, "artifact": claim.artifact_digest}
        )
        self._hold(holding)
        self.wake()
        return True

    def _make_holding(self, claim: Claim) -> Holding:
        return Holding(
            claim,
            self._engine_config,
            self._registry,
            self._consumer,
            artifact=self._named.artifact(claim.artifact_digest),
            time_to_live_s=self._config.lease_s,
            changed=self._woken.set,
        )

    def _hold(self, holding: Holding) -> None:
        self._holdings[holding.claim] = holding
        self._tasks[holding] = self._group.create_task(holding.run(), name=f"holding {holding.claim.name}")

    def _place(self, holding: Holding, artifact: Artifact) -> None:
        """Gives a holding its host: one that is there, or a new one."""
        key = (artifact.compute_digest, artifact.tokenizer_digest, complete(holding.config))
        host = self._hosts.get(key)
        if host is not None and host is holding.host:
            return
        if host is None:
            profile = holding.config.profile(artifact.compute_digest).id
            taken = any(one.profile == profile for one in self._hosts.values())
            holding.failure = _profile_taken(profile) if taken else None
            if taken:
                holding.keeper.wake()
                return
            host = self._hosts[key] = self._make_host(holding.claim, artifact, holding.config)
            self._tasks[host] = self._group.create_task(host.run(), name=f"model {host.name}")
        elif host.draining:
            # It takes no more requests: another one comes after it.
            return
        holding.host, holding.failure = host, None
        host.artifact = artifact
        holding.keeper.wake()
        self._changed()

    def _keep(self, key: HostKey, host: ModelHost) -> None:
        if host.draining or (task := self._retiring.pop(key, None)) is None:
            return
        task.cancel()
        host.keep()
        logger.info("a model is wanted again", extra={"model": host.name, "profile": host.profile})

    def _let_go(self, key: HostKey, host: ModelHost) -> None:
        if key not in self._retiring:
            logger.info("a model is let go", extra={"model": host.name, "profile": host.profile})
            self._retiring[key] = self._group.create_task(self._retire(key, host), name=f"retire {host.name}")

    def _is_leaving(self, host: ModelHost) -> bool:
        return any(self._hosts.get(key) is host for key in self._retiring)

    async def _retire(self, key: HostKey, host: ModelHost) -> None:
        # Where no heartbeat ever named it, nothing was sent to it.
        if host.ready is not None or host.announced is not None:
            await retire(host, self._redis, self._consumer, timeout_s=self._config.retire_timeout_s)
        host.draining = True
        task = self._tasks.pop(host)
        task.cancel()
        await asyncio.wait({task})
        host.close()
        del self._hosts[key]
        del self._retiring[key]
        for holding in self._holdings.values():
            holding.host = None if holding.host is host else holding.host
        logger.info("a model is gone", extra={"model": host.name, "profile": host.profile})
        self._changed()
        self.wake()

    async def _drop(self, holding: Holding) -> None:
        if self._holdings.get(holding.claim) is not holding:
            return
        del self._holdings[holding.claim]
        task = self._tasks.pop(holding)
        task.cancel()
        await asyncio.wait({task})
        await holding.keeper.release()
        self._taking_up.wake()


def _profile_taken(profile: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"this worker serves the same weights ({profile}) with another tokenizer; it cannot serve the two at "
        "once: serve this one on another worker, or take the other away first",
        reason="PROFILE_TAKEN",
    )
