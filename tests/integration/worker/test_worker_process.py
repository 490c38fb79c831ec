"""`python -m treadle_worker` with its real engine, a registry that answers over gRPC, and a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mock_engine import read_scores
from transformers import LlamaConfig, LlamaForCausalLM

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.api.worker.v1 import queue_pb2, worker_pb2, worker_pb2_grpc
from treadle.errors import NotFound
from treadle.models.stored_folder import file_digest
from treadle.queue import workers
from treadle.queue.keys import RequestKeys
from treadle.queue.log import read_log
from treadle.rpc import RpcServer, open_channel


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Knows one model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def ResolveModel(self, request, context):
        if request.model != "toy":
            raise NotFound(f"no {request.model}", reason="MODEL_NOT_FOUND")
        artifact = artifact_pb2.Artifact(
            digest="sha256:a",
            compute_digest="sha256:c",
            tokenizer_digest="sha256:t",
            location=str(self._folder),
            files=[
                artifact_pb2.ArtifactFile(path=path.name, digest=file_digest(path), bytes=path.stat().st_size)
                for path in self._folder.iterdir()
            ],
        )
        return registry_pb2.ResolveModelResponse(artifact=artifact)


@pytest.fixture
def model_folder(folder: Path) -> Path:
    """A tiny random Llama beside the byte tokenizer."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * spread if "norm" in name else 0.3 * spread)
    model.save_pretrained(folder)
    return folder


@dataclass
class Running:
    process: asyncio.subprocess.Process
    address: str
    channel: grpc.aio.Channel
    stub: worker_pb2_grpc.WorkerServiceAsyncStub
    log: Path

    async def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return response.status

    async def until_ready(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if await self.health() == health_pb2.HealthCheckResponse.SERVING:
                        return
                assert self.process.returncode is None, self.log.read_text()[-3000:]
                await asyncio.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
async def started(redis_url: str, model_folder: Path, tmp_path: Path) -> AsyncIterator[Running]:
    registry_port, port = free_port(), free_port()
    registry = RpcServer(f"127.0.0.1:{registry_port}")
    registry.add(
        registry_pb2_grpc.add_RegistryServiceServicer_to_server,
        Registry(model_folder),
        "treadle.api.registry.v1.RegistryService",
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TREADLE_WORKER_ADDRESS": f"127.0.0.1:{port}",
        "TREADLE_WORKER_NAME": "w",
        "TREADLE_WORKER_MODELS": "toy",
        "TREADLE_WORKER_GRACE_PERIOD_S": "10",
        "TREADLE_REGISTRY_ADDRESS": f"127.0.0.1:{registry_port}",
        "TREADLE_REDIS_URL": redis_url,
        "TREADLE_ENGINE_KV_CACHE_BYTES": str(8 << 20),
        "TREADLE_ENGINE_NUM_THREADS": "1",
    }
    log = tmp_path / "worker.log"
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "treadle_worker", stderr=output, env=environment
        )
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            one = Running(process, f"127.0.0.1:{port}", channel, stub, log)
            # The registry comes later than the worker, as it may.
            await asyncio.sleep(0.5)
            async with registry.running(grace_s=0):
                await one.until_ready()
                yield one
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_the_process_serves_recovers_its_engine_and_leaves_in_good_order(
    redis, started, ask, outcome, first_tokens, lanes_empty
):
    (beat,) = await workers.heartbeats(redis)
    assert beat.state == queue_pb2.WORKER_STATE_READY
    (profile,) = beat.profiles
    assert (profile.max_model_len, profile.vocab_size) == (512, 257)

    # Alone, in a crowd, and across the death of its engine a request gives the same tokens.
    prompt = list(range(1, 70))
    await ask("alone", 200, prompt=prompt)
    alone = await outcome("alone", 60)
    assert len(alone.token_ids) == 200
    for number in range(8):
        await ask(f"crowd{number}", 20 + number, prompt=prompt)
    for number in range(8):
        assert (await outcome(f"crowd{number}", 60)).token_ids == alone.token_ids[: 20 + number]

    status = await started.stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=5)
    engine = status.profiles[0].engine
    assert engine.num_output_tokens >= 200 + sum(range(20, 28))
    assert engine.prefix_cache_hits > 0
    assert engine.resident_bytes > 1 << 20
    (child,) = [one for one in psutil.Process(started.process.pid).children() if one.pid == engine.process_id]

    await ask("moved", 200, prompt=prompt)
    await first_tokens("moved", 20)
    child.kill()
    moved = await outcome("moved", 60)
    assert moved.token_ids == alone.token_ids
    assert moved.text == alone.text
    assert moved.kinds.count("fence") == 2
    await started.until_ready()
    await lanes_empty()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await started.stub.LoadModel(worker_pb2.LoadModelRequest(model="other"), timeout=5)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    # SIGTERM lets a running request end.
    await ask("last", 300)
    await first_tokens("last", 5)
    started.process.send_signal(signal.SIGTERM)
    assert (await outcome("last", 60)).terminal.finished.usage.output_tokens == 300
    async with asyncio.timeout(15):
        assert await started.process.wait() == 0
    assert await workers.heartbeats(redis) == []
    lines = [json.loads(line) for line in started.log.read_text().splitlines()]
    assert any(line["message"] == "the model is ready" for line in lines)
    assert not [line for line in lines if "a task had failed" in line["message"]]


async def test_a_generated_answer_is_scored_with_the_log_probabilities_that_it_had(
    redis, started, ask, ask_task, outcome, lanes_empty
):
    prompt = list(range(1, 70))
    await ask("answer", 60, prompt=prompt, output={"logprobs": 1})
    token_ids = (await outcome("answer", 60)).token_ids
    log = await read_log(redis, RequestKeys("default", "answer"))
    given = [one.logprob for _, entry in log.entries for one in entry.tokens.logprobs]
    work = {
        "inputs": [{"token_ids": [*prompt, *token_ids], "first": 69}, {"token_ids": [5, 6], "first": 1}],
        "score": {},
    }
    await ask_task("scored", work=work)
    scores = read_scores((await outcome("scored", 60)).terminal.task_result.data)
    assert len(scores) == 61
    assert [logprob for _, logprob in scores[:-1]] == given
    print(f"{len(given)} log-probabilities, of {len(set(given))} different values, are the same")
    assert len(set(given)) > 10

    await ask_task("embed", work={"inputs": [{"token_ids": [5, 6]}], "embed": {"pooling": "mean"}})
    error = (await outcome("embed", 60)).terminal.error
    assert error.message == "the model cannot embed; it can: generate, score"
    await lanes_empty()
    status = await started.stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=5)
    engine = status.profiles[0].engine
    assert (engine.num_task_inputs, engine.num_task_tokens) == (2, 69 + 60 + 2)
    assert engine.prefix_cache_hits >= 64


async def test_drain_by_rpc_takes_no_more(redis, started, ask, first_tokens, outcome):
    await ask("r1", 200)
    await first_tokens("r1", 5)
    await started.stub.Drain(worker_pb2.DrainRequest(), timeout=30)
    assert (await outcome("r1")).terminal.finished.usage.output_tokens == 200
    assert await started.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await started.health("liveness") == health_pb2.HealthCheckResponse.SERVING
    status = await started.stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=5)
    assert status.state == queue_pb2.WORKER_STATE_DRAINING
    started.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(15):
        assert await started.process.wait() == 0
