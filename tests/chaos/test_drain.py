"""SIGTERM under load, each service in turn: it says so at once, no request fails, and it leaves in time."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from dataclasses import dataclass, field

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_process import NOT_SERVING, SERVING, ServiceProcess
from service_stack import target
from waiting import until

from treadle.client import AsyncClient
from treadle.errors import TreadleError
from treadle.rpc import open_channel

CLIENTS = 12
AT_ONCE_S = 1.0
"""A gateway's or a worker's loop is busy under this load, and two cores are all there is."""
LEAVING = ["worker", "tokenizer", "gateway", "registry", "trainer"]
GRACE_PERIOD_S = {"worker": 20, "tokenizer": 10, "gateway": 6, "registry": 5, "trainer": 10}


@dataclass
class Load:
    """Clients that ask one request after the other, through any gateway, until `stop`."""

    address: str
    model: str
    ended: int = 0
    reconnections: int = 0
    failures: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _numbers: itertools.count = field(default_factory=itertools.count)

    async def run(self) -> None:
        async with AsyncClient(self.address, model=self.model) as client, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._ask(client))

    async def _ask(self, client: AsyncClient) -> None:
        while not self.stop.is_set():
            number = next(self._numbers)
            length = (20, 60, 5000)[number % 3]
            words = f"Sweet night number {number}"
            stream = client.stream(words, max_new_tokens=length, ignore_eos=True, seed=number, top_k=50)
            try:
                answer = await stream.collect()
            except TreadleError as error:
                self.failures.append(f"{number}: {error.code} {error.reason} {error.message}")
                continue
            finally:
                self.reconnections += stream.reconnections
            if len(answer.token_ids) != length:
                self.failures.append(f"{number}: {len(answer.token_ids)} tokens of {length}")
            self.ended += 1


async def until_not_serving(service: ServiceProcess, watching: asyncio.Event) -> float:
    """Watches the service's readiness; when it went, on the monotonic clock."""
    async with open_channel(service.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        async for answer in watch:
            if answer.status == SERVING:
                watching.set()
            elif answer.status == NOT_SERVING:
                watch.cancel()
                return time.monotonic()
    raise AssertionError(f"{service.name} ended without a word")


@pytest.mark.slow
async def test_each_service_leaves_under_load_and_no_request_fails(stack):
    gateways = target([service.address for service in stack.of("gateway")])
    load = Load(gateways, stack.model)
    running = asyncio.create_task(load.run())
    await until(lambda: load.ended >= CLIENTS, "the load runs")
    for kind in LEAVING:
        # The first gateway is where all of the clients are.
        leaving = stack.of(kind)[0]
        before, reconnected, watching = load.ended, load.reconnections, asyncio.Event()
        watch = asyncio.create_task(until_not_serving(leaving, watching))
        await asyncio.wait_for(watching.wait(), 10)
        told = time.monotonic()
        leaving.signal(signal.SIGTERM)
        said_s = await watch - told
        await until(lambda gone=leaving: not gone.alive, f"{kind} leaves", GRACE_PERIOD_S[kind] + 5)
        took_s = time.monotonic() - told
        assert leaving.exit_code == 0, leaving.tail()
        assert said_s < AT_ONCE_S
        assert took_s < GRACE_PERIOD_S[kind]
        # Whoever is left carries the load.
        done = load.ended
        await until(lambda done=done: load.ended >= done + 2 * CLIENTS, f"it goes on without {leaving.name}")
        print(
            f"{leaving.name}: not serving after {1000 * said_s:.0f} ms, gone after {took_s:.1f} s of "
            f"{GRACE_PERIOD_S[kind]}; meanwhile and after {load.ended - before} requests ended, "
            f"{load.reconnections - reconnected} connections made again, {len(load.failures)} failed"
        )
        assert not load.failures
        leaving.start()
        await asyncio.to_thread(leaving.until_ready)
    load.stop.set()
    await asyncio.wait_for(running, 60)
    assert not load.failures
    assert load.reconnections > 0, "no client had to go elsewhere"
    print(f"{len(LEAVING)} services left and came back, {load.ended} requests ended, 0 failed")
