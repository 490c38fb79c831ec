"""The trainer's process: health, reflection and a graceful stop around the training contract."""

from __future__ import annotations

import asyncio
import logging

from treadle.api.training.v1.training_pb2_grpc import add_TrainingServiceServicer_to_server
from treadle.rpc import RpcServer
from treadle.telemetry.service import running_telemetry
from treadle_trainer.config import TrainerConfig
from treadle_trainer.servicer import SERVICE, TrainingServicer

logger = logging.getLogger(__name__)


async def serve(config: TrainerConfig, stop: asyncio.Event) -> None:
    """Serves until `stop` is set."""
    security = config.transport.server()
    async with running_telemetry("trainer", config.metrics_address, security) as telemetry:
        server = RpcServer(config.address, security=security, telemetry=telemetry)
        server.add(add_TrainingServiceServicer_to_server, TrainingServicer(), SERVICE)
        async with server.running(config.grace_period_s):
            await server.set_ready(True)
            await stop.wait()
            logger.info("stopping")
