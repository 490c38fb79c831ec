"""The engine process's loop in a thread, around a mock engine; the client against real processes is in
tests/golden, where there is a model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from treadle_worker import engine_process
from treadle_worker.config import EngineConfig
from treadle_worker.engine_protocol import (
    AbortRequest,
    AddRequest,
    AddTask,
    DeviceMemory,
    EngineCommand,
    EngineCommands,
    EngineEvent,
    EngineStart,
    EngineStats,
    Loading,
    Ready,
    SamplingParams,
    Shutdown,
    StepOutputs,
    TaskInput,
    Turn,
    TurnOver,
)
from treadle_worker.framing import FrameSocket


class MockEngine:
    """Counts steps; has work until it has made `budget` of them."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.num_shared = 0
        self.left = 0
        self.closed = False

    @property
    def has_work(self) -> bool:
        return self.left > 0

    def add_request(self, request: AddRequest) -> None:
        self.commands.append(request.request_id)
        self.left = 5

    def add_task(self, task: AddTask) -> None:
        self.commands.append(f"{task.task} {task.request_id}")
        self.left = 5

    def abort(self, request_id: str) -> None:
        self.commands.append(f"-{request_id}")

    def ready(self) -> Ready:
        memory = DeviceMemory(allocated_bytes=7)
        return Ready(
            max_model_len=100,
            vocab_size=10,
            num_blocks=4,
            block_size=8,
            max_num_seqs=2,
            process_id=1,
            device_memory=memory,
            tasks=["score"],
        )

    def shares_device(self) -> None:
        self.num_shared += 1

    def report(self) -> StepOutputs:
        return StepOutputs(outputs=[], stats=EngineStats(num_commands=len(self.commands)))

    def close(self) -> None:
        self.closed = True

    def step(self) -> StepOutputs:
        if not self.commands:
            raise RuntimeError("a step without a reason")
        self.left = max(0, self.left - 1)
        return StepOutputs(outputs=[], stats=EngineStats(num_steps=5 - self.left))


@pytest.fixture
def engine() -> MockEngine:
    return MockEngine()


@pytest.fixture
def served(engine: MockEngine, monkeypatch) -> Iterator[tuple[FrameSocket, threading.Thread]]:
    """Our end of the channel of a process that is just started, loading for a while."""

    def load(start: EngineStart) -> MockEngine:
        time.sleep(0.25)
        return engine

    monkeypatch.setattr(engine_process, "load_engine", load)
    monkeypatch.setattr(engine_process, "LOADING_INTERVAL_S", 0.1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=engine_process.serve, args=(FrameSocket(theirs),), daemon=True)
        thread.start()
        yield FrameSocket(ours), thread


def say(frames: FrameSocket, *commands: EngineCommand) -> None:
    frames.send(msgspec.msgpack.encode(EngineCommands(commands=list(commands))))


def events(frames: FrameSocket, count: int) -> list[EngineEvent]:
    got: list[EngineEvent] = []
    while len(got) < count:
        got += [msgspec.msgpack.decode(frame, type=EngineEvent) for frame in frames.receive(None)]
    return got


def add(request_id: str) -> AddRequest:
    return AddRequest(request_id=request_id, prompt_token_ids=[1], sampling=SamplingParams(max_new_tokens=1))


def test_it_loads_serves_and_shuts_down(served, engine):
    frames, thread = served
    start = EngineStart(model_folder="folder", **EngineConfig().model_dump(exclude={"seed"}))
    frames.send(msgspec.msgpack.encode(start))
    said: list[EngineEvent] = []
    while not (said and isinstance(said[-1], Ready)):
        said += events(frames, 1)
    assert len(said) >= 3
    assert all(isinstance(event, Loading) for event in said[:-1])
    assert (said[-1].num_blocks, said[-1].vocab_size) == (4, 10)
    assert said[-1].device_memory.allocated_bytes == 7
    assert said[-1].tasks == ["score"]
    assert said[-1].generates
    say(frames, add("a"), add("b"), AbortRequest(request_id="a"))
    steps = events(frames, 5)
    assert [event.stats.num_steps for event in steps] == [1, 2, 3, 4, 5]
    assert engine.commands == ["a", "b", "-a"]
    say(frames, AbortRequest(request_id="b"))
    assert isinstance(events(frames, 1)[0], StepOutputs), "the gauges of an engine with nothing left to do"
    say(frames, Shutdown())
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert engine.closed


def test_without_the_turn_it_takes_commands_and_makes_no_step(served, engine):
    frames, thread = served
    start = EngineStart(model_folder="folder", **EngineConfig().model_dump(exclude={"seed"}))
    frames.send(msgspec.msgpack.encode(start))
    said: list[EngineEvent] = []
    while not (said and isinstance(said[-1], Ready)):
        said += events(frames, 1)
    say(frames, Turn(granted=False), add("waits"))
    over, report = events(frames, 2)
    assert isinstance(over, TurnOver)
    assert report.stats == EngineStats(num_commands=1)
    assert engine.num_shared == 1
    say(frames, AbortRequest(request_id="waits"), add("next"))
    assert events(frames, 1)[0].stats.num_commands == 3
    assert engine.left == 5
    say(frames, Turn(granted=True))
    steps = events(frames, 5)
    assert [event.stats.num_steps for event in steps] == [1, 2, 3, 4, 5]
    assert engine.num_shared == 2, "whoever is given the turn knows that another one had it"
    say(frames, Turn(granted=False), Turn(granted=True), Turn(granted=False))
    assert events(frames, 2) == [TurnOver(), TurnOver()]
    assert engine.left == 0
    say(frames, Shutdown())
    thread.join(timeout=20)
    assert engine.closed


def test_commands_that_came_while_it_loaded_are_kept(served, engine):
    frames, thread = served
    start = EngineStart(model_folder="folder", **EngineConfig().model_dump(exclude={"seed"}))
    frames.send(msgspec.msgpack.encode(start))
    task = AddTask(request_id="too", task="score", inputs=[TaskInput(token_ids=[1, 2], first=1)])
    say(frames, add("early"), task)
    say(frames, Shutdown())
    thread.join(timeout=20)
    assert engine.commands == ["early", "score too"]
