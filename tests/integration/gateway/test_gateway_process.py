"""The gateway as a process: settings from the environment, JSON logs, a good end on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.process import child_command
from treadle.rpc import from_rpc_error, open_channel


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_sigterm_ends_streams_in_good_order(
    redis_url, registry_server, tokenizer_server, worker, generation, stream, read, eventually
):
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        "TREADLE_GATEWAY_ADDRESS": address,
        "TREADLE_GATEWAY_GRACE_PERIOD_S": "3",
        "TREADLE_REGISTRY_ADDRESS": f"127.0.0.1:{registry_server.port}",
        "TREADLE_TOKENIZER_ADDRESS": f"127.0.0.1:{tokenizer_server.port}",
        "TREADLE_REDIS_URL": redis_url,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = child_command([sys.executable, "-m", "treadle_gateway"])
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
    try:
        async with open_channel(address) as channel, asyncio.timeout(30):
            health = health_pb2_grpc.HealthStub(channel)
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = health_pb2.HealthCheckRequest()

            async def is_ready() -> bool:
                status = (await health.Check(request, timeout=10, wait_for_ready=True)).status
                return status == health_pb2.HealthCheckResponse.SERVING

            await eventually(is_ready, "it is ready", 20)
            worker.hold("long", 2)
            permits = worker.hold("short", 2)
            long, short = [stream(stub, generation(name, 4)) for name in ("long", "short")]
            for call in (long, short):
                await read(call, 3)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            # A gateway that leaves takes no more calls.
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            permits.release()
            permits.release()
            assert len(await read(short)) == 3
            # What does not end in time is told to attach elsewhere.
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await read(long)
            assert from_rpc_error(ended.value).reason == "DRAINING"
            _, output = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    lines = [json.loads(line) for line in output.decode().splitlines()]
    assert {line["service"] for line in lines} == {"gateway"}
    assert [line for line in lines if line.get("request_id") == "short" and line["message"] == "queued"]
    assert not [line for line in lines if line["level"] in ("ERROR", "CRITICAL")]
    assert not [line for line in lines if "Hello" in json.dumps(line)]
