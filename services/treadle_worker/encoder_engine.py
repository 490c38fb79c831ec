"""The encoder's engine: tasks in, results out, one batch of texts at a time. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from treadle.models.encoder_config import EncoderConfig
from treadle_worker.admission import check_task
from treadle_worker.batch_former import BatchFormer, Text
from treadle_worker.device_sharing import DeviceSharing
from treadle_worker.engine_protocol import (
    AddRequest,
    AddTask,
    DeviceMemory,
    EngineStats,
    Ready,
    SequenceOutput,
    StepOutputs,
    Task,
    TaskInput,
    TaskOutput,
)

NOT_FINITE = "the model's numbers are not finite"
MAX_STEP_S = 0.5
"""What a step should take at most, on a device of its own too: an abort, or another engine that begins, waits
for its end. A longer one would make no better use of the device."""
FIRST_TOKENS = 64.0
"""Budget of the first step, before it is known what a token takes."""
_NEWEST = 0.2
"""Weight of the last step in what a token is expected to take."""

Result = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TextWork:
    """A text of a step, and the task that it is part of."""

    text: TaskInput
    task: AddTask


class Runner(Protocol):
    """What computes texts: the encoder runner, or a mock of it."""

    def run(self, works: Sequence[TextWork]) -> list[Result | None]:
        """What is asked of each text, in their order; None where the model's numbers are not finite.

        "embed", and "rank" by embeddings: float32 [dimensions]. "classify", and "rank" by a head: float32
        [labels]. "tag": 8 bytes a token, as queue.proto's TagWork lays them out.
        """
        ...

    def close(self) -> None:
        """Gives back all memory; nothing is run after."""
        ...


@dataclass(slots=True)
class _Running:
    """A task that is here."""

    task: AddTask
    results: list[Result | None] = field(init=False)
    num_left: int = field(init=False)
    begun: bool = False

    def __post_init__(self) -> None:
        self.num_left = len(self.task.inputs)
        self.results = [None] * self.num_left

    def data(self) -> bytes:
        """What queue.proto says of the task, from all results."""
        results = [result for result in self.results if result is not None]
        if self.task.task == "rank" and self.task.pooling:
            query, *documents = (result.astype(np.float64) for result in results)
            return np.array([document @ query for document in documents], "<f4").tobytes()
        return b"".join(result.tobytes() for result in results)


def tasks_of(config: EncoderConfig) -> tuple[Task, ...]:
    """What can be asked of an encoder with that head."""
    match config.head:
        case "sequence":
            return ("classify", "rank") if config.num_labels == 1 else ("classify",)
        case "token":
            return ("tag",)
        case _:
            return ("embed", "rank")


class EncoderEngine:
    """Takes tasks apart into texts, computes them in batches, and puts results together in the inputs' order.

    A task that cannot be computed ends alone, with an error. An exception out of the runner says nothing of
    any one task: it leaves `step`, and the engine must not go on.
    """

    def __init__(
        self,
        runner: Runner,
        former: BatchFormer,
        config: EncoderConfig,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_shared_step_ms: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        device_memory: Callable[[], DeviceMemory] = DeviceMemory,
    ) -> None:
        """`max_num_seqs`: tasks held at once; `max_shared_step_ms`: what a step should take at most while
        another engine uses the device (0: whatever its budget takes)."""
        self.runner = runner
        self.former = former
        self.config = config
        self.tasks = tasks_of(config)
        self.max_model_len = min(max_model_len, config.max_input_tokens)
        self._max_num_seqs = max_num_seqs
        self._max_shared_step_s = max_shared_step_ms / 1000
        self._clock = clock
        self._device_memory = device_memory
        self._running: dict[str, _Running] = {}
        self._outputs: list[SequenceOutput] = []
        self._task_outputs: list[TaskOutput] = []
        """Both not delivered yet."""
        self._sharing = DeviceSharing(clock)
        self._token_s = 0.0
        """What a token of the budget takes; 0: not known yet."""
        self._num_steps = 0
        self._num_inputs = 0
        self._num_tokens = 0
        self._num_commands = 0

    def ready(self) -> Ready:
        """What the I/O process is told of it: it has no KV blocks."""
        return Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.config.vocab_size,
            num_blocks=0,
            block_size=1,
            max_num_seqs=self._max_num_seqs,
            process_id=os.getpid(),
            device_memory=self._device_memory(),
            tasks=list(self.tasks),
            generates=False,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self._running or self._outputs or self._task_outputs)

    def add_request(self, request: AddRequest) -> None:
        """Refuses it: the next step says so."""
        self._num_commands += 1
        self._drop(request.request_id)
        self._outputs.append(
            SequenceOutput(
                request_id=request.request_id,
                first_index=len(request.output_token_ids),
                token_ids=[],
                finish_reason="error",
                error=f"the model does not generate; it can {', '.join(self.tasks)}",
            )
        )

    def add_task(self, task: AddTask) -> None:
        """Takes a task in. One with an id that is there already replaces the other.

        What cannot be computed is answered by the next step.
        """
        self._num_commands += 1
        self._drop(task.request_id)
        if error := self._refusal(task):
            self._task_outputs.append(TaskOutput(request_id=task.request_id, error=error))
            return
        self._running[task.request_id] = _Running(task)
        self.former.add(task.request_id, [len(one.token_ids) for one in task.inputs], task.priority)

    def _refusal(self, task: AddTask) -> str | None:
        """Why the task cannot be computed, or None."""
        config = self.config
        if task.task not in self.tasks:
            return f"the model cannot {task.task}; it can {', '.join(self.tasks)}"
        if task.task == "rank" and bool(task.pooling) == bool(config.head):
            return f"pooling: {task.pooling!r} where the model ranks by " + (
                "its head" if config.head else "embeddings"
            )
        if task.dimensions > config.hidden_size:
            return f"dimensions: {task.dimensions} are more than the model's {config.hidden_size}"
        # Where the model has no kinds of tokens, all are of the first one.
        return check_task(task, config.vocab_size, self.max_model_len, max(1, config.type_vocab_size))

    def abort(self, request_id: str) -> None:
        """Drops a task, if it is there; nothing more is said of it."""
        self._num_commands += 1
        self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._outputs = [output for output in self._outputs if output.request_id != request_id]
        self._task_outputs = [output for output in self._task_outputs if output.request_id != request_id]
        if self._running.pop(request_id, None) is not None:
            self.former.abort(request_id)

    def shares_device(self) -> None:
        """Another engine had the device until now, or is about to: steps are kept short for a while."""
        self._sharing.handed_over()

    def step(self) -> StepOutputs:
        """Computes one batch, and returns what it completed and what was decided since the last step."""
        started = self._clock()
        texts = self.former.form(self._budget())
        admitted = self._begin(texts)
        if texts:
            self._num_steps += 1
            works = [self._work(text) for text in texts]
            self._take(texts, self.runner.run(works))
            self._learn(sum(text.cost for text in texts), self._clock() - started)
        return self._said(started, admitted)

    def report(self) -> StepOutputs:
        """What was decided since the last step, without another one."""
        return self._said(self._clock(), [])

    def _said(self, scheduled_at: float, admitted: list[str]) -> StepOutputs:
        outputs, self._outputs = self._outputs, []
        task_outputs, self._task_outputs = self._task_outputs, []
        return StepOutputs(
            outputs=outputs,
            task_outputs=task_outputs,
            stats=self.stats(),
            scheduled_at=scheduled_at,
            admitted=admitted,
        )

    def _budget(self) -> float | None:
        """What the step may take of the budget; None: all of it."""
        if not self._num_steps:
            return FIRST_TOKENS
        most_s = self._max_shared_step_s if self._sharing.is_shared else 0.0
        return max(1.0, (most_s or MAX_STEP_S) / self._token_s) if self._token_s else None

    def _learn(self, cost: float, took_s: float) -> None:
        token_s = took_s / cost
        self._token_s += (_NEWEST if self._token_s else 1.0) * (token_s - self._token_s)

    def _begin(self, texts: Sequence[Text]) -> list[str]:
        """The tasks of which this step computes the first texts."""
        begun = []
        for text in texts:
            running = self._running[text.task_id]
            if not running.begun:
                running.begun = True
                begun.append(text.task_id)
        return begun

    def _work(self, text: Text) -> TextWork:
        task = self._running[text.task_id].task
        return TextWork(task.inputs[text.index], task)

    def _take(self, texts: Sequence[Text], results: Sequence[Result | None]) -> None:
        """Puts results where they belong, and ends the tasks that are complete or have failed."""
        for text, result in zip(texts, results, strict=True):
            running = self._running.get(text.task_id)
            if running is None:
                # An input before this one has failed the task.
                continue
            self._num_inputs += 1
            self._num_tokens += text.num_tokens
            if result is None:
                self._end(text.task_id, error=f"inputs[{text.index}]: {NOT_FINITE}")
                continue
            running.results[text.index] = result
            running.num_left -= 1
            if not running.num_left:
                self._end(text.task_id, data=running.data())

    def _end(self, task_id: str, *, data: bytes = b"", error: str = "") -> None:
        self._drop(task_id)
        self._task_outputs.append(TaskOutput(request_id=task_id, data=data, error=error))

    def close(self) -> None:
        """Drops every task, and gives back the memory of the model; takes nothing after."""
        for task_id in list(self._running):
            self._drop(task_id)
        self._outputs.clear()
        self._task_outputs.clear()
        self.runner.close()

    def stats(self) -> EngineStats:
        """Gauges of now, and counters since the start: tasks run from their first text to their last."""
        num_running = sum(running.begun for running in self._running.values())
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._running) - num_running,
            num_steps=self._num_steps,
            num_task_inputs=self._num_inputs,
            num_task_tokens=self._num_tokens,
            num_commands=self._num_commands,
            device_memory=self._device_memory(),
        )
