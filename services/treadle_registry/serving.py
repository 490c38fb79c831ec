"""The registry as a running server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from google.longrunning import operations_pb2_grpc

from treadle.api.registry.v1 import registry_pb2_grpc
from treadle.rpc import RpcServer
from treadle.security import ServerSecurity
from treadle.telemetry.service import Telemetry, running_telemetry
from treadle_registry.config import RegistryConfig
from treadle_registry.eviction import Eviction
from treadle_registry.operations.inspections import Inspections
from treadle_registry.operations.operations import Operations
from treadle_registry.planning import Planner
from treadle_registry.registry import Registry
from treadle_registry.servicing.operations_servicer import SERVICE_NAME, OperationsServicer
from treadle_registry.servicing.servicer import RegistryServicer
from treadle_registry.transfers import Transfers
from treadle_registry.upkeep import Upkeep

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serving(
    config: RegistryConfig, telemetry: Telemetry | None = None, security: ServerSecurity | None = None
) -> AsyncIterator[RpcServer]:
    """Opens the store and serves it until the block ends; then running jobs are killed."""
    registry = await Registry.open(config.store)
    eviction = Eviction(registry, quota=config.max_store_bytes, unknown_s=config.lease_unknown_s)
    upkeep = Upkeep(registry, eviction)
    operations = Operations(
        registry,
        eviction,
        max_running=config.max_imports,
        max_waiting=config.max_waiting_imports,
        kept=config.kept_operations,
    )
    transfers = Transfers(
        registry.store,
        max_uploads=config.max_uploads,
        max_downloads=config.max_downloads,
        max_upload_bytes=config.max_upload_bytes,
        used=registry.uses.touch_file,
    )
    try:
        interrupted = await operations.recover()
        logger.info("store opened", extra={"store": str(config.store), "interrupted": interrupted})
        server = RpcServer(
            config.address, security=security or config.transport.server(), telemetry=telemetry
        )
        server.add(
            registry_pb2_grpc.add_RegistryServiceServicer_to_server,
            RegistryServicer(
                registry, operations, eviction, Inspections(registry), Planner(registry), transfers
            ),
            "treadle.api.registry.v1.RegistryService",
        )
        server.add(
            operations_pb2_grpc.add_OperationsServicer_to_server,
            OperationsServicer(operations, registry.store),
            SERVICE_NAME,
        )
        async with transfers.running(), server.running(config.grace_period_s):
            upkeep.start()
            await server.set_ready(True)
            try:
                yield server
            finally:
                # Watches have no end of their own: they must not use up the grace period.
                registry.changes.close()
    finally:
        await operations.close()
        await upkeep.close()
        await registry.close()


async def serve(config: RegistryConfig, stop: asyncio.Event) -> None:
    """Serves until `stop` is set."""
    # One for both ports: the server reads its keys again when they change.
    security = config.transport.server()
    async with (
        running_telemetry("registry", config.metrics_address, security) as telemetry,
        serving(config, telemetry, security),
    ):
        await stop.wait()
