"""Two real engine processes at one device: never both at once, each its share, and what a death leaves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from tiny_encoders import make, save_canonical
from waiting import until

from treadle_worker.config import EngineConfig
from treadle_worker.engine_client import EngineClient
from treadle_worker.engine_protocol import (
    AddRequest,
    AddTask,
    EngineCommand,
    EngineEvent,
    Failed,
    Loading,
    Ready,
    SamplingParams,
    StepOutputs,
    TaskInput,
    Turn,
    TurnOver,
)
from treadle_worker.models.device_turns import DeviceTurns, Seat
from treadle_worker.models.turns import Turns, telling

CONFIG = EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=1 << 21, num_threads=1, max_num_seqs=8)


class Recorded:
    """An engine whose turns and steps are written down."""

    def __init__(self, client: EngineClient, name: str) -> None:
        self.client, self.name = client, name
        self.turns: list[tuple[float, float]] = []
        """From when it was given the turn to when it had given it back."""
        self.steps: list[float] = []
        self.ended = 0
        self._granted_at: float | None = time.monotonic()
        self._num_steps = 0

    async def send(self, commands: Sequence[EngineCommand]) -> None:
        for command in commands:
            if isinstance(command, Turn) and command.granted:
                self._granted_at = time.monotonic()
        await self.client.send(commands)

    async def events(self, inner: AsyncIterator[EngineEvent]) -> AsyncIterator[EngineEvent]:
        async for event in inner:
            if isinstance(event, TurnOver) and self._granted_at is not None:
                self.turns.append((self._granted_at, time.monotonic()))
                self._granted_at = None
            if isinstance(event, StepOutputs) and event.stats.num_steps > self._num_steps:
                self._num_steps = event.stats.num_steps
                self.steps.append(event.scheduled_at)
            yield event

    def finish(self) -> None:
        if self._granted_at is not None:
            self.turns.append((self._granted_at, time.monotonic()))


async def ready(events: AsyncIterator[EngineEvent]) -> Ready:
    async for event in events:
        if isinstance(event, Ready):
            return event
        assert isinstance(event, Loading), event
    raise AssertionError("the engine ended before it was ready")


@contextlib.asynccontextmanager
async def at_the_table(
    folder: Path, name: str, turns: Turns
) -> AsyncIterator[tuple[Recorded, Seat, AsyncIterator[EngineEvent]]]:
    client = await EngineClient.start(folder, CONFIG)
    try:
        engine, events = Recorded(client, name), client.events()
        said = await ready(events)
        async with turns.joined("cpu", engine, said) as seat:
            yield engine, seat, telling(engine.events(events), seat)
            engine.finish()
    finally:
        await client.stop()


def request(number: int) -> AddRequest:
    sampling = SamplingParams(max_new_tokens=400, temperature=0.0)
    return AddRequest(request_id=f"r{number}", prompt_token_ids=[5, 6, 7], sampling=sampling)


def task(number: int) -> AddTask:
    texts = [TaskInput(token_ids=[3 + (number + place) % 90] * (5 + place % 60)) for place in range(64)]
    return AddTask(request_id=f"t{number}", task="embed", pooling="mean", inputs=texts)


async def keep_busy(engine: Recorded, seat: Seat, events: AsyncIterator[EngineEvent]) -> str:
    """Gives the engine four things to do, and another whenever one ends; why it failed, once it does."""
    make_one = request if engine.name == "decoder" else task
    seat.set_wants(True)
    await engine.send([make_one(number) for number in range(4)])
    number = 4
    async for event in events:
        if isinstance(event, Failed):
            return event.message
        assert isinstance(event, StepOutputs)
        ended = sum(output.finish_reason is not None for output in event.outputs)
        assert not any(output.error for output in [*event.outputs, *event.task_outputs])
        ended += len(event.task_outputs)
        engine.ended += ended
        if ended:
            await engine.send([make_one(number + place) for place in range(ended)])
            number += ended
    return ""


async def until_handed_over(device: DeviceTurns, times: int) -> None:
    wanted = device.num_handovers + times
    await until(lambda: device.num_handovers >= wanted, f"{times} hand-overs", timeout_s=120)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_canonical(make("bert", "", seed=1), tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("task_share", [0.3, 0.6])
async def test_two_engines_never_compute_at_once_and_get_their_shares(
    tiny_llama_folder, encoder_folder, task_share
):
    turns = Turns(task_share)
    async with (
        at_the_table(tiny_llama_folder, "decoder", turns) as (decoder, *decoding),
        at_the_table(encoder_folder, "encoder", turns) as (encoder, *encoding),
    ):
        device = turns.devices["cpu"]
        assert device.num_handovers == 0
        busy = [asyncio.create_task(keep_busy(decoder, *decoding))]
        await until(lambda: len(decoder.steps) > 20, "steps of one alone")
        assert device.num_handovers == 0, "one alone is told nothing"
        busy.append(asyncio.create_task(keep_busy(encoder, *encoding)))
        await until_handed_over(device, 60)
        used = [seat.used_s for seat in (decoding[0], encoding[0])]
        for one in busy:
            one.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    print(f"{used[1] / sum(used):.3f} of {task_share}, {device.num_handovers} hand-overs")
    assert used[1] / sum(used) == pytest.approx(task_share, abs=0.1)
    for engine in (decoder, encoder):
        inside = sum(any(begin <= at <= end for begin, end in engine.turns) for at in engine.steps)
        print(f"{engine.name}: {len(engine.steps)} steps in {len(engine.turns)} turns; {engine.ended} ended")
        assert len(engine.turns) > 10
        assert inside == len(engine.steps) >= 10
    everybody = sorted(decoder.turns + [turn for turn in encoder.turns if turn[1] > encoder.turns[0][1]])
    overlaps = [late for early, late in itertools.pairwise(everybody) if late[0] < early[1]]
    assert not overlaps, "the turn is never held by two"


async def test_one_that_is_killed_with_the_turn_leaves_it(tiny_llama_folder, encoder_folder):
    turns = Turns(0.5)
    async with at_the_table(encoder_folder, "encoder", turns) as (encoder, *encoding):
        device = turns.devices["cpu"]
        busy = asyncio.create_task(keep_busy(encoder, *encoding))
        async with at_the_table(tiny_llama_folder, "decoder", turns) as (decoder, *decoding):
            dying = asyncio.create_task(keep_busy(decoder, *decoding))
            await until_handed_over(device, 6)
            os.kill(decoder.client.process_id, signal.SIGKILL)
            async with asyncio.timeout(60):
                assert "-9" in await dying
        assert device.holder is encoding[0]
        before = encoder.ended
        await until(lambda: encoder.ended >= before + 20, "twenty tasks", timeout_s=60)
        print(f"{encoder.ended - before} tasks were answered after the other's death")
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
