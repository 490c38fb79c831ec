"""A worker process with a pretending engine: `fake_worker.py REDIS_URL FOLDER NAME LEASE_S STEP_S`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "harness"))

from fake_engine import FakeEngine, stored_folder
from fake_registry import FakeRegistry

from treadle.rpc import run_service
from treadle_worker import intake
from treadle_worker.config import EngineConfig, WorkerConfig
from treadle_worker.jobs import Artifact
from treadle_worker.worker import Worker


async def serve(arguments: list[str], stop: asyncio.Event) -> None:
    redis_url, folder, name, lease_s, step_s = arguments
    intake.SWEEP_S = 0.1

    artifact = Artifact("sha256:a", "sha256:c", "sha256:t", stored_folder(Path(folder)))
    registry = FakeRegistry({"sha256:a": artifact}, {"toy": "sha256:a"})

    async def start_engine(folder: Path, config: EngineConfig) -> FakeEngine:
        return FakeEngine(float(step_s))

    async def set_ready(ready: bool) -> None:
        if ready:
            print("ready", flush=True)

    config = WorkerConfig(name=name, models=("toy",), TREADLE_REDIS_URL=redis_url, lease_s=float(lease_s))
    worker = Worker(
        config,
        EngineConfig(),
        registry=registry,
        watch=registry.watch,
        start_engine=start_engine,
        set_ready=set_ready,
    )
    async with worker.running():
        await stop.wait()


run_service("fake-worker", lambda: sys.argv[1:], serve)
