"""Worker processes that are killed or stopped: another goes on where they were."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import until

from treadle.queue import keys
from treadle.queue.keys import RequestKeys
from treadle.queue.log import read_log

LEASE_S = 1.5
LENGTH = 200


@contextlib.asynccontextmanager
async def worker_process(
    redis_url: str, folder: Path, name: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker in a process of its own, ready; killed at the end."""
    script = Path(__file__).with_name("fake_worker.py")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(script), redis_url, str(folder), name, str(LEASE_S), "0.008"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        async with asyncio.timeout(30):
            assert (await process.stdout.readline()).strip() == b"ready"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # What it still prints must not keep it.
        await process.communicate()


async def owners(redis, names) -> list[str]:
    values = [await redis.get(RequestKeys("default", name).owner) for name in names]
    return [value.decode().rpartition("-")[0] for value in values if value]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_what_a_lost_worker_held_goes_on_elsewhere(
    redis, redis_url, folder, ask, outcome, first_tokens, lanes_empty, answer, number
):
    async with (
        worker_process(redis_url, folder, "one") as first,
        worker_process(redis_url, folder, "two"),
    ):
        # Both know the lane when the burst comes.
        await ask("first", 10)
        await outcome("first")
        await asyncio.sleep(0.3)
        asked = {f"r{place}": await ask(f"r{place}", LENGTH) for place in range(16)}
        for name in asked:
            await first_tokens(name, 1)
        await asyncio.sleep(random.uniform(0, 0.5))
        before = await owners(redis, asked)
        first.send_signal(number)
        delivered = {name: await read_log(redis, RequestKeys("default", name)) for name in asked}
        takeovers = 0
        for name, prompt in asked.items():
            found = await outcome(name, 40)
            assert found.token_ids == answer(prompt, LENGTH)
            assert found.text == bytes(answer(prompt, LENGTH)).decode(errors="replace")
            assert found.terminal.finished.usage.output_tokens == LENGTH
            takeovers += found.kinds.count("fence") - 1
            log = await read_log(redis, RequestKeys("default", name))
            early = delivered[name].entries
            assert log.entries[: len(early)] == early
        held = before.count("one")
        assert takeovers == held > 0
        assert before.count("two") > 0
        lengths = {name: await redis.xlen(RequestKeys("default", name).log) for name in asked}
        if number == signal.SIGSTOP:
            first.send_signal(signal.SIGCONT)
            await asyncio.sleep(1.0)
            # It woke, found the fences, and wrote nothing more.
            assert lengths == {name: await redis.xlen(RequestKeys("default", name).log) for name in asked}
        await lanes_empty()
        print("takeovers:", takeovers)
        assert keys.NOBODY not in before


async def test_tasks_of_a_killed_worker_are_computed_elsewhere_and_answered_once(
    redis, redis_url, folder, ask_task, outcome, lanes_empty
):
    async with (
        worker_process(redis_url, folder, "one") as first,
        worker_process(redis_url, folder, "two"),
    ):
        # Both know the lane when the burst comes.
        await ask_task("first")
        await outcome("first")
        await asyncio.sleep(0.3)
        asked = {f"t{place}": await ask_task(f"t{place}", 250) for place in range(16)}

        async def both_have_some() -> bool:
            return len(found := await owners(redis, asked)) == 16 and len(set(found)) == 2

        await until(both_have_some, "both compute some of them", timeout_s=10)
        held = (await owners(redis, asked)).count("one")
        first.kill()
        takeovers = 0
        for name, data in asked.items():
            found = await outcome(name, 40)
            assert found.terminal.task_result.data == data
            takeovers += found.kinds.count("fence") - 1
        await lanes_empty()
        print("computed again:", takeovers)
        assert takeovers == held > 0
