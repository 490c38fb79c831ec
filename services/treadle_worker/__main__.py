"""`python -m treadle_worker`: the worker's I/O process."""

from __future__ import annotations

import asyncio

from treadle.api.registry.v1 import registry_pb2_grpc
from treadle.api.worker.v1 import worker_pb2, worker_pb2_grpc
from treadle.deployments import watch_models
from treadle.rpc import RpcServer, open_channel, run_service
from treadle.telemetry.service import running_telemetry
from treadle.transfer.node_cache import NodeCache
from treadle_worker.clients import RegistryClient
from treadle_worker.config import EngineConfig, WorkerConfig
from treadle_worker.engine_client import EngineClient
from treadle_worker.servicer import WorkerServicer
from treadle_worker.worker import Worker

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name


async def serve(configs: tuple[WorkerConfig, EngineConfig], stop: asyncio.Event) -> None:
    """Serves until `stop`, then drains and leaves within the grace period."""
    config, engine_config = configs
    security = config.transport.server()
    async with (
        running_telemetry("worker", config.metrics_address, security) as telemetry,
        open_channel(config.registry_address, config.transport.credentials()) as channel,
    ):
        node_cache = NodeCache(config.node_cache, registry_pb2_grpc.RegistryServiceStub(channel))
        server = RpcServer(config.address, security=security, telemetry=telemetry)
        worker = Worker(
            config,
            engine_config,
            registry=RegistryClient(channel),
            watch=watch_models(channel),
            obtain=node_cache.held,
            start_engine=EngineClient.start,
            set_ready=server.set_ready,
            telemetry=telemetry,
        )
        server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, WorkerServicer(worker), SERVICE)
        async with server.running(grace_s=1.0):
            await _until(stop, worker)


async def _until(stop: asyncio.Event, worker: Worker) -> None:
    """Runs the worker until `stop`; also ends when it is set while Redis is still away."""
    stopped = asyncio.create_task(stop.wait(), name="stop")
    run = asyncio.create_task(_run(worker, stop), name="worker")
    await asyncio.wait({stopped, run}, return_when=asyncio.FIRST_COMPLETED)
    if not worker.heart.num_beats:
        run.cancel()
    stopped.cancel()
    await asyncio.gather(stopped, return_exceptions=True)
    try:
        await run
    except asyncio.CancelledError:
        if not run.cancelled():
            raise


async def _run(worker: Worker, stop: asyncio.Event) -> None:
    async with worker.running():
        await stop.wait()


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    run_service("worker", lambda: (WorkerConfig(), EngineConfig()), serve)


if __name__ == "__main__":
    main()
