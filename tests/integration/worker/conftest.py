"""Workers in this process, with an engine that pretends and a Valkey that is real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import fake_engine as fake
import pytest
from fake_registry import FakeRegistry
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import LaneEntry, StreamEntry, TaskWork, Terminal
from treadle.models.profile import ServingProfile
from treadle.queue.connection import connect
from treadle.queue.keys import RequestKeys
from treadle.queue.log import read_log
from treadle.queue.submission import submit
from treadle.telemetry.service import Telemetry
from treadle_worker.config import EngineConfig, WorkerConfig
from treadle_worker.engine_protocol import TaskInput
from treadle_worker.jobs import Artifact
from treadle_worker.worker import Worker

PROFILE = ServingProfile("sha256:c", "bfloat16").id


@dataclass
class Outcome:
    """A finished request's log, read as a client would."""

    kinds: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    terminal: Terminal | None = None


async def read_outcome(redis: Redis, request_id: str, timeout_s: float = 20) -> Outcome:
    """Waits for a request's end; checks that every index comes once and nothing follows the end."""
    async with asyncio.timeout(timeout_s):
        while True:
            log = await read_log(redis, RequestKeys("default", request_id))
            if any(entry.HasField("terminal") for _, entry in log.entries):
                break
            await asyncio.sleep(0.01)
    found = Outcome()
    for _, entry in log.entries:
        found.kinds.append(entry.WhichOneof("entry"))
        if entry.HasField("tokens"):
            assert entry.tokens.index == len(found.token_ids)
            found.token_ids.extend(entry.tokens.token_ids)
            found.text += entry.tokens.text
        elif entry.HasField("terminal"):
            found.terminal = entry.terminal
    assert found.kinds.count("terminal") == 1
    assert found.kinds.count("started") <= 1
    assert set(found.kinds[found.kinds.index("terminal") + 1 :]) <= {"fence"}
    return found


async def await_tokens(redis: Redis, request_id: str, count: int = 1) -> list[StreamEntry]:
    """Waits until a request's log holds some tokens."""
    async with asyncio.timeout(20):
        while True:
            log = await read_log(redis, RequestKeys("default", request_id))
            entries = [entry for _, entry in log.entries if entry.HasField("tokens")]
            if sum(len(entry.tokens.token_ids) for entry in entries) >= count:
                return entries
            await asyncio.sleep(0.005)


@pytest.fixture
def outcome(redis: Redis) -> Callable[..., Awaitable[Outcome]]:
    return partial(read_outcome, redis)


@pytest.fixture
def lanes_empty(redis: Redis) -> Callable[[], Awaitable[None]]:
    """Waits until every lane is empty."""

    async def wait(left: int = 0) -> None:
        async with asyncio.timeout(10):
            while True:
                if sum([await redis.xlen(lane) for lane in await redis.keys("treadle:lane:*")]) == left:
                    return
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def first_tokens(redis: Redis) -> Callable[..., Awaitable[list[StreamEntry]]]:
    return partial(await_tokens, redis)


@pytest.fixture
def answer() -> Callable[..., list[int]]:
    return fake.answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    fake.write_tokenizer(folder)
    return folder


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@dataclass
class Bench:
    """A worker and the engines that it was given, oldest first."""

    worker: Worker
    engines: list[fake.FakeEngine]
    readiness: list[bool]
    registry: CollectorRegistry

    def counted(self, name: str, **labels: str) -> float:
        """What a metric of the worker says of its model."""
        found = self.registry.get_sample_value(f"treadle:{name}", {"model_name": "toy", **labels})
        return 0.0 if found is None else found

    @property
    def engine(self) -> fake.FakeEngine:
        return self.engines[-1]


@pytest.fixture
def bench(redis_url: str, folder: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[Bench]]:
    """Makes running workers: `async with bench(step_s=…, max_claimed=…) as one`."""

    @contextlib.asynccontextmanager
    async def running(
        step_s: float = 0.001, engine: dict[str, object] | None = None, **settings
    ) -> AsyncIterator[Bench]:
        engines: list[fake.FakeEngine] = []
        readiness: list[bool] = []

        artifact = Artifact("sha256:a", "sha256:c", "sha256:t", fake.stored_folder(folder))
        registry = FakeRegistry({"sha256:a": artifact}, {"toy": "sha256:a"})

        async def start_engine(folder: Path, config: EngineConfig) -> fake.FakeEngine:
            engines.append(fake.FakeEngine(step_s, **(engine or {})))
            return engines[-1]

        async def set_ready(ready: bool) -> None:
            readiness.append(ready)

        defaults = {"name": "w", "models": ("toy",), "TREADLE_REDIS_URL": redis_url}
        config, telemetry = WorkerConfig(**(defaults | settings)), Telemetry()
        worker = Worker(
            config,
            EngineConfig(),
            registry=registry,
            watch=registry.watch,
            start_engine=start_engine,
            set_ready=set_ready,
            telemetry=telemetry,
        )
        async with worker.running():
            async with asyncio.timeout(10):
                while True:
                    if worker.state == "ready":
                        break
                    await asyncio.sleep(0.005)
            yield Bench(worker, engines, readiness, telemetry.registry)

    return running


@pytest.fixture
def ask(redis: Redis) -> Callable[..., object]:
    """Submits a request as a gateway does; returns its prompt."""

    async def submitted(request_id: str, length: int = 40, **fields) -> list[int]:
        prompt = fields.pop("prompt", [len(request_id), *request_id.encode()])
        stopping = {"max_new_tokens": length} | fields.pop("stopping", {})
        entry = LaneEntry(
            request_id=request_id,
            tenant="default",
            artifact_digest="sha256:a",
            prompt_token_ids=prompt,
            stopping=stopping,
            sampling={"seed": 7},
            gateway_id="g1",
            **({"profile": PROFILE, "payload_digest": "d", "retention_ms": 60_000} | fields),
        )
        assert await submit(redis, entry, lane_limit=1000)
        return prompt

    return submitted


@pytest.fixture
def ask_task(redis: Redis) -> Callable[..., object]:
    """Submits a task as a gateway does, of so many steps; returns its answer."""

    async def submitted(
        request_id: str, steps: int = 2, *, work: dict[str, object] | None = None, **fields
    ) -> bytes:
        inputs = [{"token_ids": [steps, place + 1, *request_id.encode()], "first": 1} for place in range(3)]
        task = TaskWork(**({"inputs": inputs, "score": {}} if work is None else work))
        entry = LaneEntry(
            request_id=request_id,
            tenant="default",
            artifact_digest="sha256:a",
            task=task,
            gateway_id="g1",
            **({"profile": PROFILE, "payload_digest": "d", "retention_ms": 20_000} | fields),
        )
        assert await submit(redis, entry, lane_limit=1000)
        return fake.sums([TaskInput(token_ids=list(one.token_ids)) for one in task.inputs])

    return submitted
