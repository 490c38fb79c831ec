"""An engine without a model: its tokens are a function of prompt and position, as a seeded one's are.

A task takes as many steps as its first token says, and its answer is each input's sum.
"""

from __future__ import annotations

import asyncio
import functools
import os
import struct
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from treadle.errors import Unavailable
from treadle.models.stored_folder import StoredFile, StoredFolder, file_digest
from treadle_worker.engine_protocol import (
    AbortRequest,
    AddRequest,
    AddTask,
    EngineCommand,
    EngineEvent,
    EngineStats,
    Failed,
    Loading,
    Ready,
    SequenceOutput,
    StepOutputs,
    Task,
    TaskInput,
    TaskOutput,
    Turn,
    TurnOver,
)

EOS = 256
BROKEN = ord("~")
"""A token that no task may have: its engine gives it up."""


def write_tokenizer(folder: Path) -> None:
    """A vocabulary of the 256 bytes, in the order of their values, and an end of text."""
    alphabet = ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    spelling = {number: chr(number) for number in printable}
    spelling |= {number: chr(256 + place) for place, number in enumerate(others)}
    assert set(spelling.values()) == set(alphabet)
    backend = tokenizers.Tokenizer(BPE({spelling[number]: number for number in range(256)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))


def stored_folder(folder: Path) -> StoredFolder:
    """The folder with what lies in it, as the registry would list it."""
    files = [StoredFile(path.name, file_digest(path), path.stat().st_size) for path in folder.iterdir()]
    return StoredFolder(folder, "sha256:a", tuple(files))


_CHARACTERS = [character.encode() for character in "abcdefghij klmnopqrst uvwxyz é ü 線 織"]


def answer(prompt: Sequence[int], length: int) -> list[int]:
    """The ids that the engine makes: characters of one, two and three bytes, chosen by the prompt."""
    return list(_answer(sum(prompt), length))


@functools.lru_cache(maxsize=1024)
def _answer(place: int, length: int) -> tuple[int, ...]:
    ids: list[int] = []
    while len(ids) < length:
        place += 1
        ids.extend(_CHARACTERS[(place * 8) % len(_CHARACTERS)])
    return tuple(ids[:length])


def sums(inputs: Sequence[TaskInput]) -> bytes:
    """A task's answer."""
    return b"".join(struct.pack("<f", sum(one.token_ids)) for one in inputs)


class FakeEngine:
    """Same interface as EngineClient; one token a request and step.

    Without `generates` it is an encoder's: it has no blocks.
    """

    def __init__(
        self,
        step_s: float = 0.001,
        max_num_seqs: int = 64,
        *,
        tasks: Sequence[Task] = ("score",),
        generates: bool = True,
    ) -> None:
        self.step_s = step_s
        self.max_num_seqs = max_num_seqs
        self.tasks = tasks
        self.generates = generates
        self.added: list[AddRequest] = []
        self.asked: list[AddTask] = []
        self.aborted: list[str] = []
        self.most_at_once = 0
        self.most_tokens = 0
        """Of tasks, held at once."""
        self._active: dict[str, tuple[AddRequest, int]] = {}
        self._tasks: dict[str, tuple[AddTask, int]] = {}
        self._admitted: list[str] = []
        self.has_turn = True
        self._num_overs = 0
        self._dead = False
        self._work = asyncio.Event()
        self._steps = 0

    @property
    def process_id(self) -> int:
        return os.getpid()

    @property
    def active(self) -> int:
        return len(self._active) + len(self._tasks)

    def die(self) -> None:
        self._dead = True
        self._work.set()

    async def send(self, commands: Sequence[EngineCommand]) -> None:
        if self._dead:
            raise Unavailable("the engine is gone", reason="ENGINE_GONE")
        for command in commands:
            if isinstance(command, AddRequest):
                self.added.append(command)
                self._active[command.request_id] = command, len(command.output_token_ids)
            elif isinstance(command, AddTask):
                self.asked.append(command)
                self._tasks[command.request_id] = command, command.inputs[0].token_ids[0]
            elif isinstance(command, Turn):
                self.has_turn = command.granted
                self._num_overs += not command.granted
                continue
            else:
                assert isinstance(command, AbortRequest)
                self.aborted.append(command.request_id)
                self._active.pop(command.request_id, None)
                self._tasks.pop(command.request_id, None)
                continue
            self._admitted.append(command.request_id)
            self.most_at_once = max(self.most_at_once, self.active)
            held = [len(one.token_ids) for task, _ in self._tasks.values() for one in task.inputs]
            self.most_tokens = max(self.most_tokens, sum(held))
        self._work.set()

    async def events(self) -> AsyncIterator[EngineEvent]:
        yield Loading(stage="pretending")
        yield Ready(
            max_model_len=100_000,
            vocab_size=257,
            num_blocks=10_000 if self.generates else 0,
            block_size=16 if self.generates else 0,
            max_num_seqs=self.max_num_seqs,
            process_id=os.getpid(),
            tasks=list(self.tasks),
            generates=self.generates,
        )
        while not self._dead:
            await self._work.wait()
            self._work.clear()
            while not self._dead:
                while self._num_overs:
                    self._num_overs -= 1
                    yield TurnOver()
                if not (self.active and self.has_turn):
                    break
                await asyncio.sleep(self.step_s)
                yield self._step()
        yield Failed(message="killed by the test")

    def _step(self) -> StepOutputs:
        outputs = [self._advance(request, place) for request, place in list(self._active.values())]
        answers = [self._compute(task, left) for task, left in list(self._tasks.values())]
        self._steps += 1
        admitted, self._admitted = self._admitted, []
        return StepOutputs(
            outputs=outputs,
            task_outputs=[answer for answer in answers if answer is not None],
            stats=EngineStats(num_steps=self._steps, num_running=self.active),
            scheduled_at=time.monotonic(),
            admitted=admitted,
        )

    def _compute(self, task: AddTask, left: int) -> TaskOutput | None:
        if left > 1:
            self._tasks[task.request_id] = task, left - 1
            return None
        del self._tasks[task.request_id]
        if any(BROKEN in one.token_ids for one in task.inputs):
            return TaskOutput(request_id=task.request_id, error="it cannot be computed")
        return TaskOutput(request_id=task.request_id, data=sums(task.inputs))

    def _advance(self, request: AddRequest, place: int) -> SequenceOutput:
        length = request.sampling.max_new_tokens
        facts = {"request_id": request.request_id, "num_cached_tokens": 3}
        if place >= length:
            del self._active[request.request_id]
            return SequenceOutput(first_index=place, token_ids=[], finish_reason="length", **facts)
        ends = EOS in request.sampling.stop_token_ids and place == length - 2
        token = EOS if ends else _answer(sum(request.prompt_token_ids), length)[place]
        last = ends or place + 1 == length
        self._active[request.request_id] = request, place + 1
        if last:
            del self._active[request.request_id]
        return SequenceOutput(
            first_index=place,
            token_ids=[token],
            finish_reason=("stop_token" if ends else "length") if last else None,
            stop_token_id=EOS if ends else None,
            **facts,
        )

    async def stop(self) -> int:
        self.die()
        return 0
