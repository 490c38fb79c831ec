"""Half of the clients are killed: their blocks are free within a second, the other half notices nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from client_record import undisturbed
from engine_view import EngineState, engine_state, until_engine_empty
from waiting import until

from treadle.process import child_command

HARNESS = Path(__file__).parents[1] / "harness"
PROCESSES, CLIENTS = 4, 16
BOUND_S = 1.0


@contextlib.asynccontextmanager
async def client_process(address: str, asked) -> AsyncIterator[asyncio.subprocess.Process]:
    """Clients that stream; killed at the end."""
    script = [sys.executable, str(HARNESS / "client_process.py"), address, str(CLIENTS)]
    process = await asyncio.create_subprocess_exec(
        *child_command([*script, asked.SerializeToString().hex()]),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HARNESS), *filter(None, sys.path)])},
        limit=1 << 20,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_killing_32_of_64_clients_frees_their_blocks_within_a_second(stack, gateways, queue, ask):
    asked = ask("Good heart", 1500, sampling={"repetition_penalty": 1.2})
    expected = await undisturbed(gateways[0], asked)
    workers = stack.of("worker")

    async def state() -> EngineState:
        first, second = [await engine_state(worker) for worker in workers]
        return EngineState(
            first.running + second.running,
            first.waiting + second.waiting,
            first.used_blocks + second.used_blocks,
            first.prompt_tokens + second.prompt_tokens,
            first.output_tokens + second.output_tokens,
        )

    half = PROCESSES * CLIENTS // 2
    async with contextlib.AsyncExitStack() as processes:
        addresses = [service.address for service in stack.of("gateway")] * (PROCESSES // 2)
        clients = [await processes.enter_async_context(client_process(one, asked)) for one in addresses]
        async with asyncio.timeout(60):
            for client in clients:
                assert (await client.stdout.readline()).strip() == b"streaming"
        before = await state()
        assert before.running == 2 * half
        killed_at = time.monotonic()
        for client in clients[:2]:
            client.send_signal(signal.SIGKILL)

        async def half_is_free() -> bool:
            return (await state()).running <= half

        await until(half_is_free, "half of the requests are gone")
        freed_s = time.monotonic() - killed_at
        after = await state()
        assert after.running == half, "others went with them"
        # Each of them had some blocks; what the others need meanwhile is less.
        assert after.used_blocks < before.used_blocks
        async with asyncio.timeout(60):
            told = [json.loads(await client.stdout.readline()) for client in clients[2:]]
    answers = [tuple(ids) for one in told for ids in one]
    assert answers == [expected.token_ids] * half
    await queue.until_empty()
    for worker in workers:
        await until_engine_empty(worker)
    print(
        f"{half} of {2 * half} clients killed: their blocks ({before.used_blocks} -> {after.used_blocks}) "
        f"were free after {freed_s:.2f} s; the other {len(answers)} answers are as they would have been"
    )
    assert freed_s < BOUND_S
