"""A worker on a machine that cannot read the registry's store: it fetches the model, and serves it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cutting_proxy import CuttingProxy
from distant_registry import DistantRegistry, distant_registry
from redis.asyncio import Redis
from service_process import ServiceProcess
from small_folder import write_model
from waiting import until

from treadle.api.worker.v1 import queue_pb2
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.client import Artifact
from treadle.local.ports import free_ports
from treadle.queue import workers
from treadle.queue.submission import submit
from treadle_worker.config import EngineConfig


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[DistantRegistry]:
    async with distant_registry(tmp_path) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", hidden_size=256, intermediate_size=16384)


@contextlib.contextmanager
def worker(tmp_path: Path, name: str, registry: str, redis_url: str):
    port, metrics = free_ports(2)
    settings = {
        "TREADLE_REGISTRY_ADDRESS": registry,
        "TREADLE_REDIS_URL": redis_url,
        "TREADLE_NODE_CACHE": str(tmp_path / "node"),
        "TREADLE_WORKER_MODELS": "m",
        "TREADLE_ENGINE_KV_CACHE_BYTES": str(8 << 20),
        "TREADLE_ENGINE_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    made = ServiceProcess(name, "worker", f"127.0.0.1:{port}", f"127.0.0.1:{metrics}", settings, tmp_path)
    made.start()
    try:
        yield made
    finally:
        if made.alive:
            made.kill()


async def answered(redis: Redis, outcome, artifact: Artifact, request_id: str) -> list[int]:
    """The tokens of an answer."""
    entry = LaneEntry(
        request_id=request_id,
        tenant="default",
        profile=EngineConfig().profile(artifact.compute_digest).id,
        artifact_digest=artifact.digest,
        tokenizer_digest=artifact.tokenizer_digest,
        prompt_token_ids=[5, 6, 7],
        stopping={"max_new_tokens": 8},
        sampling={"seed": 7},
        gateway_id="g1",
        payload_digest="d",
        retention_ms=60_000,
    )
    assert await submit(redis, entry, lane_limit=10)
    return (await outcome(request_id, 60)).token_ids


async def state(redis: Redis) -> list[int]:
    return [beat.state for beat in await workers.heartbeats(redis)]


async def test_it_fetches_the_model_once_a_node_and_goes_on_after_a_kill(
    registry: DistantRegistry, model: Path, redis: Redis, redis_url: str, outcome, tmp_path: Path
):
    artifact = await registry.imported(model, "m")
    files = {file.digest: file.size for file in artifact.files}
    total = sum(files.values())
    port = int(registry.address.rpartition(":")[2])
    # The first connection that carries so much stands still then.
    limit = total // 2
    async with CuttingProxy(port, [limit], stalls=True).running() as proxy:
        with worker(tmp_path, "worker-1", f"127.0.0.1:{proxy.port}", redis_url) as first:
            await until(lambda: proxy.num_cut == 1, "half of it has come", 90)
            # It is loading, and lives.
            await until(lambda: is_loading(redis), "the worker says that it loads", 30)
            first.signal_group(signal.SIGKILL)
            await until(lambda: not first.alive, "it is gone")
    here = arrived(tmp_path / "node")
    assert 0 < here < total
    with worker(tmp_path, "worker-2", registry.address, redis_url) as second:
        second.until_ready()
        tokens = await answered(redis, outcome, artifact, "r1")
        fetched = [
            line for line in second.log() if line["message"] == "files were fetched into the node cache"
        ]
        assert len(fetched) == 1
        received = fetched[0]["received_bytes"]
        sent = registry.sent_bytes()
        # Another on the node finds everything, and answers the same.
        with worker(tmp_path, "worker-3", registry.address, redis_url) as third:
            third.until_ready()
            second.signal(signal.SIGTERM)
            await until(lambda: not second.alive, "the second worker has left", 60)
            assert await answered(redis, outcome, artifact, "r2") == tokens
            assert registry.sent_bytes() == sent
    print(f"{total} bytes: {here} were there after the kill, {received} came after it, 0 for a third worker")
    assert len(tokens) == 8
    assert received == total - here


async def is_loading(redis: Redis) -> bool:
    return queue_pb2.WORKER_STATE_LOADING in await state(redis)


def arrived(cache: Path) -> int:
    """Bytes that lie in the cache, parts included."""
    return sum(path.stat().st_size for path in (cache / "blobs").iterdir())
