"""The score tasks that an engine holds: each input is a sequence that is computed and never grows."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListOf

import numpy as np
import numpy.typing as npt
import torch

from treadle_worker.batch import ScheduledChunk
from treadle_worker.engine_protocol import AddTask, SamplingParams, TaskOutput
from treadle_worker.sampler import best_tokens
from treadle_worker.scheduler import Scheduler, SchedulerOutput
from treadle_worker.scoring import Scoring
from treadle_worker.sequence import Sequence

_DRAWS_NOTHING = SamplingParams(max_new_tokens=0)


class _Task:
    """Of one task: the inputs that wait, those that are sequences now, and the results."""

    def __init__(self, command: AddTask) -> None:
        self.command = command
        self.next_index = 0
        """Of the first input that is no sequence yet."""
        self.indices: dict[Sequence, int] = {}
        """Of the sequences that have not ended."""
        self.results = [b""] * len(command.inputs)
        self.begun = False
        """Whether one of its sequences was scheduled."""

    @property
    def num_tokens(self) -> int:
        """Of the sequences that have not ended."""
        return sum(sequence.num_tokens for sequence in self.indices)


class ScoreTasks:
    """Puts sequences into the engine's scheduler, and ends them there; false while it holds none.

    Of each task there are as many as fill a step; the next ones line up behind what has come meanwhile. So a
    task of a thousand texts delays others by a few steps, not by all of its length.
    """

    def __init__(self, scheduler: Scheduler, arrivals: Iterator[int]) -> None:
        self._scheduler = scheduler
        self._arrivals = arrivals
        self._tasks: dict[str, _Task] = {}
        self.num_inputs = 0
        """Texts whose scores were computed."""
        self.num_tokens = 0

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def add(self, command: AddTask) -> None:
        """Takes a task in that was checked; none of its id may be there."""
        self._tasks[command.request_id] = task = _Task(command)
        self._line_up(task)

    def _line_up(self, task: _Task) -> None:
        """Puts the task's next sequences into the scheduler while those that it has do not fill a step."""
        command = task.command
        while (
            task.next_index < len(command.inputs) and task.num_tokens < self._scheduler.max_num_batched_tokens
        ):
            one = command.inputs[task.next_index]
            sequence = Sequence(
                request_id=command.request_id,
                token_ids=one.token_ids[:-1],
                num_prompt_tokens=len(one.token_ids) - 1,
                sampling=_DRAWS_NOTHING,
                arrival=next(self._arrivals),
                priority=command.priority,
                cache_salt=command.cache_salt,
                scoring=Scoring(one.token_ids, one.first),
            )
            task.indices[sequence] = task.next_index
            task.next_index += 1
            self._scheduler.add(sequence)

    def drop(self, request_id: str) -> None:
        """Ends a task, if it is there, and frees its blocks."""
        if (task := self._tasks.pop(request_id, None)) is not None:
            for sequence in task.indices:
                self._scheduler.finish(sequence)

    def clear(self) -> None:
        """Drops every task."""
        for request_id in list(self._tasks):
            self.drop(request_id)

    def begins(self, sequence: Sequence) -> bool:
        """Whether this is the first of its task's sequences that is scheduled."""
        task = self._tasks[sequence.request_id]
        begins, task.begun = not task.begun, True
        return begins

    def take_out(self, scheduled: SchedulerOutput) -> list[tuple[Sequence, ScheduledChunk]]:
        """Takes the scored sequences out of the step: with the chunk of each that it computes."""
        step, scored = scheduled.num_scheduled_tokens, []
        for sequence in [one for one in step if one.scoring is not None]:
            start, num_tokens = sequence.num_computed_tokens, step.pop(sequence)
            token_ids = sequence.token_ids[start : start + num_tokens]
            assert sequence.scoring is not None, "only such are taken out"
            num_rows = sequence.scoring.num_rows(start, num_tokens)
            scored.append((sequence, ScheduledChunk(token_ids, start, sequence.block_table, num_rows)))
        return scored

    def advance(
        self, scored: ListOf[tuple[Sequence, ScheduledChunk]], logits_RV: torch.Tensor
    ) -> list[TaskOutput]:
        """Moves them forward by the chunks' rows of logits, in their order; returns what has come to an end.

        As with tokens that are drawn, blocks become findable when logits behind them are finite. Where they
        are not, the task fails, with all of its inputs.
        """
        num_rows = sum(chunk.num_logits for _, chunk in scored)
        if len(logits_RV) != num_rows:
            raise RuntimeError(f"the runner gave {len(logits_RV)} rows of logits where {num_rows} are scored")
        rows = _Rows(scored, logits_RV) if num_rows else None
        outputs: list[TaskOutput] = []
        end = 0
        for sequence, chunk in scored:
            begin, end = end, end + chunk.num_logits
            if sequence.is_finished:
                continue  # its task has failed in this very step
            sequence.num_computed_tokens += len(chunk.token_ids)
            if rows is not None and end > begin:
                outputs += self._take(sequence, rows, slice(begin, end))
        return outputs

    def _take(self, sequence: Sequence, rows: _Rows, own: slice) -> list[TaskOutput]:
        scoring, request_id = sequence.scoring, sequence.request_id
        assert scoring is not None, "only scored sequences are taken"
        if not rows.sound_R[own].all():
            self.drop(request_id)
            return [TaskOutput(request_id=request_id, error="the model's logits are not finite")]
        scoring.take(rows.best_R[own], rows.logprobs_R[own])
        self._scheduler.block_manager.commit(sequence)
        if sequence.num_uncomputed_tokens:
            return []
        self._scheduler.finish(sequence)
        self.num_inputs += 1
        self.num_tokens += sequence.num_tokens + 1
        task = self._tasks[request_id]
        task.results[task.indices.pop(sequence)] = scoring.result
        self._line_up(task)
        if task.indices:
            return []
        del self._tasks[request_id]
        return [TaskOutput(request_id=request_id, data=b"".join(task.results))]


class _Rows:
    """What the rows of a step say, of all scored sequences at once."""

    def __init__(self, scored: ListOf[tuple[Sequence, ScheduledChunk]], logits_RV: torch.Tensor) -> None:
        targets = [one.scoring.targets(chunk.num_logits) for one, chunk in scored if one.scoring is not None]
        self.best_R, self.sound_R = best_tokens(logits_RV)
        self.logprobs_R = logprobs(logits_RV, np.concatenate(targets))


@torch.inference_mode()
def logprobs(logits_RV: torch.Tensor, targets_R: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Each row's log-probability of its target, as the sampler's: bitwise the same alone and among others."""
    index_R1 = torch.from_numpy(targets_R)[:, None].to(logits_RV.device)
    found: npt.NDArray[np.float32] = (
        torch.log_softmax(logits_RV, dim=1).gather(1, index_R1)[:, 0].cpu().numpy()
    )
    return found
