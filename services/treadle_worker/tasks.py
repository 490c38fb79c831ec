"""A task that this worker holds: one command for the engine, one output, one entry, which is its end.

Nothing of it is delivered before. Whoever takes it over computes it again.
"""

from __future__ import annotations

from treadle.errors import Internal, InvalidArgument, TreadleError
from treadle.queue.lanes import Delivery
from treadle.queue.log import EntryId
from treadle_worker.admission import check_task
from treadle_worker.convert_queue import result_entry
from treadle_worker.engine_protocol import AddTask, Ready, TaskOutput
from treadle_worker.jobs import TaskJob
from treadle_worker.requests import RunningRequest, not_supported


class RunningTask(RunningRequest):
    """Ends when the engine has answered."""

    job: TaskJob

    def __init__(
        self, job: TaskJob, delivery: Delivery, epoch: int, *, last: EntryId, watchers: set[str]
    ) -> None:
        super().__init__(job, delivery, epoch, last=last, watchers=watchers)
        self.name = "rerank" if job.task == "rank" else job.task
        """As models' facts and metrics call the task."""
        self.operation = "embeddings" if job.task == "embed" else self.name
        self._num_tokens = job.num_tokens
        self._data: bytes | None = None

    @property
    def num_input_tokens(self) -> int:
        """Of all inputs together."""
        return self._num_tokens

    @property
    def num_tokens(self) -> int:
        """Of all inputs together, until it is computed."""
        return 0 if self.ended else self._num_tokens

    @property
    def _is_complete(self) -> bool:
        return self._data is not None

    def usage(self) -> dict[str, str | int | list[str]]:
        """How many texts it was."""
        return {"treadle.task_inputs": len(self.job.inputs)}

    def refusal(self, ready: Ready) -> TreadleError | None:
        """What the engine cannot do, and inputs that it would refuse. The gateway has checked both."""
        job = self.job
        if job.task not in ready.tasks:
            return not_supported(self.name or "do what is asked", ready)
        error = check_task(job.to_engine(self.engine_id), ready.vocab_size, ready.max_model_len)
        return None if error is None else InvalidArgument(error, reason="TASK_REFUSED")

    def start(self) -> AddTask:
        """The engine's command."""
        return self.job.to_engine(self.engine_id)

    def accept(self, output: TaskOutput) -> None:
        """Takes the engine's answer."""
        if output.error:
            self.fail(Internal(f"the engine gave the task up: {output.error}", reason="ENGINE_ERROR"))
        elif not self.ended:
            self._data = output.data

    def _finished(self) -> bytes:
        assert self._data is not None, "only what is complete has a good end"
        return result_entry(self.job, self._data)
