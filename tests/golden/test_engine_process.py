"""The client against real engine processes: a whole life, a kill, a dead parent, a slow reader."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from treadle.errors import Unavailable
from treadle_worker.config import EngineConfig
from treadle_worker.engine_client import EngineClient
from treadle_worker.engine_process import load_engine
from treadle_worker.engine_protocol import (
    AddRequest,
    EngineEvent,
    EngineStart,
    Failed,
    Loading,
    Ready,
    SamplingParams,
    StepOutputs,
)

CONFIG = EngineConfig(
    device="cpu", dtype="float32", block_size=16, kv_cache_bytes=1 << 21, num_threads=1, max_num_seqs=32
)


def add(request_id: str, max_new_tokens: int, **fields: object) -> AddRequest:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, **fields)
    return AddRequest(request_id=request_id, prompt_token_ids=[5, 6, 7], sampling=sampling)


@pytest.fixture
async def client(tiny_llama_folder: Path) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(tiny_llama_folder, CONFIG)
    yield client
    await client.stop()


async def ready(events: AsyncIterator[EngineEvent]) -> Ready:
    """Reads up to Ready; what comes before is a sign of life."""
    async for event in events:
        if isinstance(event, Ready):
            return event
        assert isinstance(event, Loading), event
    raise AssertionError("the engine ended before it was ready")


async def test_requests_run_and_the_engine_stops(client):
    events = client.events()
    async with asyncio.timeout(120):
        said = await ready(events)
        # 3 layers, 2 heads of 16, float32, keys and values
        assert said.num_blocks == (1 << 21) // (3 * 2 * 16 * 16 * 4 * 2)
        assert (said.max_model_len, said.vocab_size, said.process_id) == (512, 512, client.process_id)
        os.kill(client.process_id, signal.SIGINT)  # Ctrl-C, which is for the supervisor
        await client.send([add(str(index), 1 + index) for index in range(20)] + [add("bad", 5, top_p=2.0)])
        tokens: dict[str, list[int]] = {}
        finished: dict[str, str] = {}
        async for event in events:
            assert isinstance(event, StepOutputs)
            for output in event.outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason:
                    finished[output.request_id] = output.finish_reason
            if len(finished) == 21:
                break
        assert finished.pop("bad") == "error"
        assert set(finished.values()) == {"length"}
        longest = tokens["19"]
        assert all(tokens[str(index)] == longest[: 1 + index] for index in range(20))
        assert event.stats.num_running == event.stats.num_waiting == 0
        assert await client.stop() == 0
        assert [event async for event in events] == []
    with pytest.raises(Unavailable):
        for _ in range(50):
            await client.send([add("late", 1)])


async def test_a_killed_engine_is_an_event(client):
    events = client.events()
    async with asyncio.timeout(120):
        await ready(events)
        await client.send([add(str(index), 400) for index in range(20)])
        async for event in events:
            if isinstance(event, StepOutputs) and event.stats.num_running == 20:
                break
        os.kill(client.process_id, signal.SIGKILL)
        last = [event async for event in events][-1]
        assert isinstance(last, Failed)
        assert "-9" in last.message
        assert await client.wait_closed() == -9
        with pytest.raises(Unavailable):
            for _ in range(50):
                await client.send([add("late", 1)])


async def test_a_slow_reader_makes_the_engine_wait(client):
    """Nobody reads: the engine stops in its step once the socket is full, and still takes commands in."""
    events = client.events()
    async with asyncio.timeout(120):
        await ready(events)
        await client.send([add(f"{index:0100}", 500, logprobs=20) for index in range(32)])

        def processor_time() -> int:
            fields = Path(f"/proc/{client.process_id}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        stalled, before = 0, processor_time()
        while stalled < 3:
            await asyncio.sleep(0.2)
            stalled = stalled + 1 if processor_time() == before else 0
            before = processor_time()
        urgent = add("x" * 4_000_000, 1)  # far more than the socket holds
        await client.send([msgspec.structs.replace(urgent, priority=1)])
        async for event in events:
            assert isinstance(event, StepOutputs)
            if any(output.request_id == urgent.request_id for output in event.outputs):
                break
        print(f"the urgent request had its token after {event.stats.num_steps} steps of 500")
        assert event.stats.num_steps < 400
        os.kill(client.process_id, signal.SIGTERM)
        assert await client.wait_closed() == -signal.SIGTERM


@pytest.mark.parametrize(
    ("changes", "num_blocks", "max_model_len", "max_num_seqs"),
    [
        ({}, 170, 512, 32),
        ({"kv_cache_bytes": 1 << 20, "block_size": 256}, 5, 512, 32),
        ({"max_num_batched_tokens": 16}, 170, 512, 16),
        ({"num_blocks": 3}, 3, 49, 32),
        ({"num_blocks": 300, "max_model_len": 100}, 300, 100, 32),
        ({"max_model_len": 10_000}, 170, 512, 32),
    ],
    ids=str,
)
def test_settings(tiny_llama_folder, changes, num_blocks, max_model_len, max_num_seqs):
    engine = load_engine(start_of(tiny_llama_folder, changes))
    assert engine.scheduler.block_manager.num_blocks == num_blocks
    assert engine.max_model_len == max_model_len
    assert engine.scheduler.max_num_seqs == max_num_seqs


def test_a_cache_without_a_block_is_refused_with_the_figures(tiny_llama_folder):
    with pytest.raises(MemoryError, match=r"= 1000 .* 12288 bytes"):
        load_engine(start_of(tiny_llama_folder, {"kv_cache_bytes": 1000}))


def start_of(folder: Path, changes: dict[str, object]) -> EngineStart:
    fields = CONFIG.model_dump(exclude={"seed"}) | {"num_threads": None} | changes
    return EngineStart(model_folder=str(folder), **fields)


async def test_a_folder_that_is_no_model_fails_with_a_reason(tmp_path):
    client = await EngineClient.start(tmp_path, CONFIG)
    async with asyncio.timeout(120):
        *_, last = [event async for event in client.events()]
        assert isinstance(last, Failed)
        assert "config.json" in last.message
        assert await client.wait_closed() == 1


PARENT = """
import asyncio, sys
from pathlib import Path
from treadle_worker.config import EngineConfig
from treadle_worker.engine_client import EngineClient
from treadle_worker.engine_protocol import Ready

async def main():
    client = await EngineClient.start(Path(sys.argv[1]), EngineConfig(device="cpu", num_threads=1))
    async for event in client.events():
        if isinstance(event, Ready):
            print(event.process_id, flush=True)

asyncio.run(main())
"""


def test_a_dead_parent_takes_its_engine_along(tiny_llama_folder):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_llama_folder)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        engine = Path(f"/proc/{int(parent.stdout.readline())}")
        assert engine.exists()
        parent.kill()
        parent.wait()
    for _ in range(200):
        if not engine.exists() or ") Z " in engine.joinpath("stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the engine outlived its parent by 10 s")
