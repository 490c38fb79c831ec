"""The tokenizer's process: parts put together, served until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from treadle.api.registry.v1 import registry_pb2_grpc
from treadle.api.tokenizer.v1.tokenizer_pb2_grpc import add_TokenizerServiceServicer_to_server
from treadle.rpc import RpcServer, open_channel
from treadle.telemetry.counted_elsewhere import CountedElsewhere
from treadle.telemetry.service import running_telemetry
from treadle.text.template_pool import TemplatePool
from treadle.transfer.node_cache import NodeCache
from treadle_tokenizer.clients import GrpcRegistry
from treadle_tokenizer.config import TokenizerConfig
from treadle_tokenizer.lanes import Lanes
from treadle_tokenizer.models import Models
from treadle_tokenizer.servicer import SERVICE, TokenizerServicer
from treadle_tokenizer.text_service import TextService

logger = logging.getLogger(__name__)

_LOOK_FOR_REGISTRY_EVERY_S = 0.25


async def serve(config: TokenizerConfig, stop: asyncio.Event) -> None:
    """Serves until `stop` is set; ready from when the registry has answered once.

    Later on the registry may be away: what it said is remembered.
    """
    async with contextlib.AsyncExitStack() as stack:
        security, credentials = config.transport.server(), config.transport.credentials()
        telemetry = await stack.enter_async_context(
            running_telemetry("tokenizer", config.metrics_address, security)
        )
        channel = await stack.enter_async_context(
            open_channel(config.registry_address, credentials, traced=telemetry.tracer.recording)
        )
        registry = GrpcRegistry(channel, timeout_s=config.registry_timeout_s)
        node_cache = NodeCache(config.node_cache, registry_pb2_grpc.RegistryServiceStub(channel))
        stack.callback(node_cache.close)
        models = Models(
            registry,
            obtain=node_cache.held,
            resolve_ttl_s=config.resolve_ttl_s,
            max_resolved=config.max_resolved,
            max_loaded=config.max_loaded,
        )
        stack.push_async_callback(models.close)
        lanes = Lanes(
            threads=config.threads,
            large_bytes=config.large_bytes,
            max_waiting=config.max_waiting,
            max_waiting_large=config.max_waiting_large,
        )
        stack.callback(lanes.close)
        templates = await stack.enter_async_context(
            TemplatePool(
                size=config.template_processes,
                deadline_s=config.template_deadline_s,
                max_waiting=config.max_waiting_templates,
                max_characters=config.max_text_bytes,
            )
        )
        server = RpcServer(config.address, security=security, telemetry=telemetry)
        CountedElsewhere(
            "treadle:template_kills",
            "Processes killed as they rendered a chat template: too long, or too much memory.",
            lambda: templates.num_killed,
            registry=telemetry.registry,
        )
        servicer = TokenizerServicer(TextService(config, models, lanes, templates))
        server.add(add_TokenizerServiceServicer_to_server, servicer, SERVICE)
        await stack.enter_async_context(server.running(config.grace_period_s))
        ready = asyncio.create_task(_ready_with(registry, server))
        try:
            await stop.wait()
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)
        logger.info("stopping")


async def _ready_with(registry: GrpcRegistry, server: RpcServer) -> None:
    while True:
        if await registry.is_there():
            break
        await asyncio.sleep(_LOOK_FOR_REGISTRY_EVERY_S)
    await server.set_ready(True)
