"""The worker's I/O process as one object: its models, its heart, its control stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from treadle.api.worker.v1.queue_pb2 import Heartbeat, LoadedProfile
from treadle.deployments import KnownModels, ModelWatch, Watch
from treadle.errors import TreadleError
from treadle.queue import workers
from treadle.queue.connection import connect, connect_blocking
from treadle.telemetry.service import Telemetry
from treadle_worker.clock import RedisClock
from treadle_worker.config import EngineConfig, WorkerConfig
from treadle_worker.convert import to_heartbeat, to_loaded_profile
from treadle_worker.engine_protocol import Ready
from treadle_worker.engine_run import EngineRun, Links
from treadle_worker.heartbeat import Heart
from treadle_worker.jobs import Artifact
from treadle_worker.metrics import WorkerMetrics
from treadle_worker.models.by_hand import ByHand
from treadle_worker.models.configuration import complete
from treadle_worker.models.model_host import ModelHost, StartEngine
from treadle_worker.models.obtaining import Obtain, where_it_lies
from treadle_worker.models.registry import Registry
from treadle_worker.models.served_models import ServedModels
from treadle_worker.models.turns import Turns
from treadle_worker.models.wanted import Claim
from treadle_worker.notices import NoticeReader

logger = logging.getLogger(__name__)

_BLOCK_S = 1.0
_MAX_BLOCKING = 128
"""Connections for reads that block: one for each model, and one for the control stream."""
_RESERVE = 0.2
"""The share of the grace period that is kept for handing back and stopping the engines."""


def loaded_profile(name: str, artifact: Artifact, host: ModelHost) -> LoadedProfile:
    """A model as the heartbeat and the control port say it."""
    return to_loaded_profile(
        name, artifact, host.profile, complete(host.config), host.state, host.ready, host.failure
    )


class Worker:
    """Serves the models of its settings, and deployments that want workers, while `running`.

    `set_ready` is told whether work should be sent here: every named model is ready and Redis answers.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine_config: EngineConfig,
        *,
        registry: Registry,
        watch: Watch,
        obtain: Obtain = where_it_lies,
        start_engine: StartEngine,
        set_ready: Callable[[bool], Awaitable[None]],
        telemetry: Telemetry | None = None,
    ) -> None:
        self.consumer = f"{config.name or socket.gethostname()}-{secrets.token_hex(6)}"
        """A name that no other process ever has: a restarted worker is another consumer."""
        self._config = config
        self._set_ready = set_ready
        self._started = time.monotonic()
        self._redis = connect(config.redis_url)
        self._blocking = connect_blocking(config.redis_url, block_s=_BLOCK_S, max_connections=_MAX_BLOCKING)
        clock = RedisClock()
        lease_ms = int(config.lease_s * 1000)
        self.heart = Heart(self._redis, clock, self.describe, self._beaten, lease_ms=lease_ms)
        telemetry = telemetry or Telemetry()
        self._metrics = WorkerMetrics(telemetry.registry)
        self._start_engine, self._obtain = start_engine, obtain
        self._engine_config = engine_config
        self._links = Links(
            self._redis,
            self._blocking,
            self.consumer,
            clock,
            config.max_claimed,
            config.max_claimed_tokens,
            lease_ms,
            config.gather_s,
            telemetry.tracer,
            Turns(config.task_share),
        )
        self.models = ServedModels(
            config,
            engine_config,
            registry,
            ModelWatch(watch, self._watched),
            self._redis,
            self.consumer,
            self._make_host,
            self._changed,
        )
        self.by_hand = ByHand(self.models)
        self._notices = NoticeReader(self._blocking, self.consumer, clock, self._runs)
        self._described: dict[ModelHost, Ready | None] = {}
        """The hosts of the last heartbeat, and the engines that they had ready."""
        self.draining = False
        self._drained: asyncio.Task[None] | None = None

    @property
    def hosts(self) -> list[ModelHost]:
        """Of every model that is here."""
        return self.models.hosts

    def _make_host(self, claim: Claim, artifact: Artifact, config: EngineConfig) -> ModelHost:
        return ModelHost(
            claim.name,
            artifact,
            config,
            claim.warm_up_prompts,
            self._links,
            self._metrics.model(claim.name),
            obtain=self._obtain,
            start_engine=self._start_engine,
            changed=self._changed,
        )

    def _changed(self) -> None:
        self.heart.wake()
        self.models.wake()

    async def _watched(self, known: KnownModels, alias: str) -> None:
        await self.models.watched(known, alias)

    def _runs(self) -> list[EngineRun]:
        return [host.running for host in self.hosts if host.running is not None]

    @property
    def state(self) -> str:
        """ "loading" until it is known of every named model whether it can be served; then "ready", or
        "failed" where none can. "draining" once it takes no more work."""
        return "draining" if self.draining else self.models.state

    @property
    def uptime_ms(self) -> int:
        """Since the worker was made."""
        return int((time.monotonic() - self._started) * 1000)

    def profiles(self) -> list[tuple[ModelHost, LoadedProfile]]:
        """The models that are here, with their state."""
        return [(host, loaded_profile(name, artifact, host)) for host, artifact, name in self.models.served()]

    def describe(self) -> Heartbeat:
        """What the heartbeat says."""
        # A worker with one model ready and another loading is ready for the first.
        any_ready = any(host.state == "ready" for host in self.hosts)
        state = "ready" if any_ready and not self.draining else self.state
        profiles = [profile for _, profile in self.profiles()]
        self._described = {host: host.ready for host in self.hosts}
        return to_heartbeat(self.consumer, self._config.address, state, profiles, self.uptime_ms)

    async def _beaten(self, taken: bool) -> None:
        if taken:
            self.models.announced(self._described)
        await self._set_ready(taken and self.state == "ready")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Worker]:
        """Serves; at the block's end drains within the grace period, hands back the rest, and stops."""
        try:
            # Redis's clock must be known before a deadline is judged.
            await self.heart.first_beat()
            # A task that fails takes the worker with it: whoever started it starts a whole one.
            async with asyncio.TaskGroup() as group:
                models = group.create_task(self.models.run(), name="models")
                others = [
                    group.create_task(self.heart.run(), name="heart"),
                    group.create_task(self._notices.run(), name="notices"),
                ]
                yield self
                await self.drain()
                # The heart beats until everything is handed back.
                models.cancel()
                await asyncio.wait({models})
                for task in others:
                    task.cancel()
        finally:
            await self._leave()

    async def drain(self) -> None:
        """Takes no more work; returns when what runs is finished, or most of the grace period is over."""
        if self._drained is None:
            self.draining = True
            self._drained = asyncio.create_task(self._drain(), name="drain")
        await asyncio.shield(self._drained)

    async def _drain(self) -> None:
        await self._set_ready(False)
        self.heart.wake()
        timeout_s = self._config.grace_period_s * (1 - _RESERVE)
        await self.models.drain(timeout_s)

    async def _leave(self) -> None:
        try:
            await workers.leave(self._redis, self.consumer)
        except TreadleError as error:
            logger.warning("could not sign off; the beat ends by itself", extra={"reason": error.reason})
        await self._redis.aclose()
        await self._blocking.aclose()
