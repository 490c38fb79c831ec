"""The gateway's parts put together, started, and taken apart in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

from redis.asyncio import Redis

from treadle.deployments import ModelWatch, watch_models
from treadle.errors import Unavailable
from treadle.queue.connection import connect, connect_blocking
from treadle.queue.workers import heartbeats
from treadle.rpc import RpcServer, open_channel
from treadle.security import ServerSecurity
from treadle.telemetry.service import Telemetry, running_telemetry
from treadle_gateway.admission import Admission
from treadle_gateway.background import BackgroundTasks
from treadle_gateway.clients import GrpcRegistry, GrpcTokenizer, is_serving
from treadle_gateway.config import GatewayConfig
from treadle_gateway.convert import to_loaded
from treadle_gateway.hold import Queue
from treadle_gateway.inference import Inference
from treadle_gateway.listing import Aliases
from treadle_gateway.log_follower import BLOCK_S, LogFollower
from treadle_gateway.metrics import GatewayMetrics
from treadle_gateway.models import ArtifactCache, Loaded, Models
from treadle_gateway.preparation import Preparation
from treadle_gateway.readiness import Readiness, redis_answers
from treadle_gateway.servicer import SERVICE, InferenceServicer, add_to_server
from treadle_gateway.tasks.preparation import TaskPreparation
from treadle_gateway.tasks.tasks import Tasks

logger = logging.getLogger(__name__)

# Shares of the grace period: until streams are told to attach elsewhere, until calls are cut, for the rest.
_STREAMS, _CALLS, _REST = 0.7, 0.8, 0.1


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway."""

    server: RpcServer
    follower: LogFollower
    background: BackgroundTasks
    admission: Admission
    gateway_id: str


@contextlib.asynccontextmanager
async def running_gateway(
    config: GatewayConfig, telemetry: Telemetry | None = None, security: ServerSecurity | None = None
) -> AsyncIterator[Gateway]:
    """Starts a gateway and stops it at the block's end, within the grace period.

    It becomes ready when Redis, registry and tokenizer answer. Raises Unavailable (ADDRESS_IN_USE).
    """
    async with contextlib.AsyncExitStack() as stack:
        redis = connect(config.redis_url, max_connections=config.redis_connections)
        stack.push_async_callback(redis.aclose)
        blocking = connect_blocking(config.redis_url, block_s=BLOCK_S)
        stack.push_async_callback(blocking.aclose)
        telemetry = telemetry or Telemetry()
        connect_to = partial(
            open_channel, credentials=config.transport.credentials(), traced=telemetry.tracer.recording
        )
        registry = await stack.enter_async_context(connect_to(config.registry_address))
        tokenizer = await stack.enter_async_context(connect_to(config.tokenizer_address))

        gateway_id = f"gw-{uuid.uuid4().hex}"
        follower = LogFollower(
            redis,
            blocking,
            gateway_id,
            patience_s=config.redis_patience_s,
            attached_ms=int(config.attached_s * 1000),
        )
        stack.push_async_callback(follower.close)
        artifacts = ArtifactCache(GrpcRegistry(registry), timeout_s=config.registry_timeout_s)
        stack.push_async_callback(artifacts.close)
        watch = ModelWatch(watch_models(registry), lambda known, alias: models.watched(known, alias))
        models = Models(artifacts, partial(_read_loaded, redis), lambda: watch.known)
        background = BackgroundTasks()
        admission = Admission(config.max_concurrent_requests)
        metrics = GatewayMetrics(telemetry.registry)
        metrics.held.set_function(lambda: admission.held)
        queue = Queue(redis, follower, background, gateway_id, lane_limit=config.lane_limit)
        texts = GrpcTokenizer(tokenizer)
        inference = Inference(
            config,
            queue,
            Preparation(models, texts, gateway_id, tokenizer_timeout_s=config.tokenizer_timeout_s),
            models,
            Aliases(GrpcRegistry(registry), timeout_s=config.registry_timeout_s, watched=lambda: watch.known),
            admission,
            metrics,
        )
        tasks = Tasks(config, queue, TaskPreparation(models, texts, config), admission, metrics)
        server = RpcServer(
            config.address, security=security or config.transport.server(), telemetry=telemetry
        )
        servicer = InferenceServicer(inference, tasks, max_batch_in_flight=config.max_batch_in_flight)
        server.add(add_to_server, servicer, SERVICE)
        await server.start()
        follower.start()
        readiness = Readiness(
            redis_answers(redis), partial(is_serving, registry), partial(is_serving, tokenizer)
        )
        watching = [
            asyncio.create_task(readiness.keep(server.set_ready), name="readiness"),
            asyncio.create_task(watch.run(), name="watch"),
        ]
        try:
            yield Gateway(server, follower, background, admission, gateway_id)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await _stop(server, follower, background, config.grace_period_s)


async def _read_loaded(redis: Redis) -> list[Loaded]:
    return to_loaded(await heartbeats(redis))


async def _stop(
    server: RpcServer, follower: LogFollower, background: BackgroundTasks, grace_s: float
) -> None:
    stopping = asyncio.create_task(server.stop(grace_s * _CALLS), name="stop")
    await asyncio.wait({stopping}, timeout=grace_s * _STREAMS)
    follower.end_all(
        Unavailable(
            "the gateway is leaving; attach, or call again with the same request_id, through another one",
            reason="DRAINING",
            retry_after_s=0.2,
        )
    )
    await stopping
    await background.finish(grace_s * _REST)


async def serve(config: GatewayConfig, stop: asyncio.Event) -> None:
    """Runs the gateway until `stop` is set."""
    # One for both ports: the server reads its keys again when they change.
    security = config.transport.server()
    async with (
        running_telemetry("gateway", config.metrics_address, security) as telemetry,
        running_gateway(config, telemetry, security),
    ):
        await stop.wait()
        logger.info("stopping", extra={"grace_period_s": config.grace_period_s})
