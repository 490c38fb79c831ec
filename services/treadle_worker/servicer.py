"""The worker's control port, for operators."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from typing import Any

from treadle.api.worker.v1 import worker_pb2, worker_pb2_grpc
from treadle.errors import invalid_field
from treadle_worker.convert import STATES, to_engine_status
from treadle_worker.models.model_host import ModelHost
from treadle_worker.resident_memory import resident_bytes
from treadle_worker.worker import Worker, loaded_profile


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Status, models by hand, drain."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def GetWorkerStatus(
        self, request: worker_pb2.GetWorkerStatusRequest, context: Any
    ) -> worker_pb2.GetWorkerStatusResponse:
        """Which models, in which state, and their engines' counts."""
        worker = self._worker
        return worker_pb2.GetWorkerStatusResponse(
            consumer=worker.consumer,
            state=STATES[worker.state],
            profiles=[
                worker_pb2.ProfileStatus(profile=profile, engine=_engine_status(host))
                for host, profile in worker.profiles()
            ],
            uptime_ms=worker.uptime_ms,
        )

    async def LoadModel(
        self, request: worker_pb2.LoadModelRequest, context: Any
    ) -> worker_pb2.LoadModelResponse:
        """Loads a model and serves it until it is unloaded, or the worker ends."""
        if not request.model:
            raise invalid_field("model", "must be an alias or an artifact's digest")
        holding = await self._worker.by_hand.load(request.model)
        assert holding.artifact is not None, "what is ready has an artifact"
        assert holding.host is not None, "and a host"
        loaded = loaded_profile(request.model, holding.artifact, holding.host)
        return worker_pb2.LoadModelResponse(profile=loaded)

    async def UnloadModel(
        self, request: worker_pb2.UnloadModelRequest, context: Any
    ) -> worker_pb2.UnloadModelResponse:
        """Lets go of a model that LoadModel has loaded."""
        await self._worker.by_hand.unload(request.profile)
        return worker_pb2.UnloadModelResponse()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        """Takes no more work, and returns when what ran is finished or handed over."""
        await self._worker.drain()
        return worker_pb2.DrainResponse()


def _engine_status(host: ModelHost) -> worker_pb2.EngineStatus | None:
    if host.running is None or host.ready is None:
        return None
    process_id, seat = host.ready.process_id, host.running.seat
    return to_engine_status(
        host.running.stats, process_id, resident_bytes(process_id), seat.used_s, seat.waited_s
    )
