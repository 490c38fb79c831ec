"""What a worker's engine holds and has done, asked at its control port."""

from __future__ import annotations

from dataclasses import dataclass

from service_process import ServiceProcess
from waiting import until

from treadle.api.worker.v1 import worker_pb2, worker_pb2_grpc
from treadle.rpc import open_channel


@dataclass(frozen=True)
class EngineState:
    """Of now, and since the engine's start."""

    running: int
    waiting: int
    used_blocks: int
    prompt_tokens: int
    """Of every request that it took in."""
    output_tokens: int

    @property
    def empty(self) -> bool:
        """Whether it holds nothing."""
        return not (self.running or self.waiting or self.used_blocks)


async def engine_state(worker: ServiceProcess) -> EngineState:
    """The state of a worker's only engine, which must be ready."""
    async with open_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        response = await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=5)
    (status,) = response.profiles
    assert status.HasField("engine"), f"{worker.name} has no engine"
    engine = status.engine
    return EngineState(
        engine.num_requests_running,
        engine.num_requests_waiting,
        status.profile.num_kv_blocks - engine.num_free_blocks,
        engine.num_prompt_tokens,
        engine.num_output_tokens,
    )


async def until_engine_empty(worker: ServiceProcess, timeout_s: float = 10.0) -> None:
    """Waits until the engine holds no request and no block."""

    async def is_empty() -> bool:
        return (await engine_state(worker)).empty

    await until(is_empty, f"the engine of {worker.name} holds nothing", timeout_s, 0.02)
