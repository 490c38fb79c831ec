"""The score tasks that an engine holds: each input is a sequence that is computed and never grows."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

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


@dataclass(slots=True)
class _Task:
    sequences: list[Sequence]
    num_left: int
    begun: bool = False
    """Whether one of its sequences was scheduled."""


class ScoreTasks:
    """Puts sequences into the engine's scheduler, and ends them there; false while it holds none."""

    def __init__(self, scheduler: Scheduler, arrivals: Iterator[int]) -> None:
        self._scheduler = scheduler
        self._arrivals = arrivals
        self._tasks: dict[str, _Task] = {}
        self.num_inputs = 0
        """Texts whose scores were computed."""
        self.num_tokens = 0

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def add(self, task: AddTask) -> None:
        """Takes a task in that was checked; none of its id may be there."""
        sequences = [
            Sequence(
                request_id=task.request_id,
                token_ids=one.token_ids[:-1],
                num_prompt_tokens=len(one.token_ids) - 1,
                sampling=_DRAWS_NOTHING,
                arrival=next(self._arrivals),
                priority=task.priority,
                cache_salt=task.cache_salt,
                scoring=Scoring(one.token_ids, one.first),
            )
            for one in task.inputs
        ]
        self._tasks[task.request_id] = _Task(sequences, len(sequences))
        for sequence in sequences:
            self._scheduler.add(sequence)

    def drop(self, request_id: str) -> None:
        """Ends a task, if it is there, and frees its blocks."""
        if (task := self._tasks.pop(request_id, None)) is not None:
            for sequence in task.sequences:
                if not sequence.is_finished:
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
        outputs: list[TaskOutput] = []
        end = 0
        for sequence, chunk in scored:
            begin, end = end, end + chunk.num_logits
            if sequence.is_finished:
                continue  # its task has failed in this very step
            sequence.num_computed_tokens += len(chunk.token_ids)
            if chunk.num_logits and (output := self._take(sequence, logits_RV[begin:end])) is not None:
                outputs.append(output)
        return outputs

    def _take(self, sequence: Sequence, logits_RV: torch.Tensor) -> TaskOutput | None:
        scoring = sequence.scoring
        assert scoring is not None, "only scored sequences are taken"
        best_R, sound_R = best_tokens(logits_RV)
        if not sound_R.all():
            self.drop(sequence.request_id)
            return TaskOutput(request_id=sequence.request_id, error="the model's logits are not finite")
        scoring.take(best_R, logprobs(logits_RV, scoring.targets(len(best_R))))
        self._scheduler.block_manager.commit(sequence)
        if sequence.num_uncomputed_tokens:
            return None
        self._scheduler.finish(sequence)
        self.num_inputs += 1
        self.num_tokens += sequence.num_tokens + 1
        task = self._tasks[sequence.request_id]
        task.num_left -= 1
        if task.num_left:
            return None
        del self._tasks[sequence.request_id]
        results = [one.scoring.result for one in task.sequences if one.scoring is not None]
        return TaskOutput(request_id=sequence.request_id, data=b"".join(results))


@torch.inference_mode()
def logprobs(logits_RV: torch.Tensor, targets_R: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Each row's log-probability of its target, as the sampler's: bitwise the same alone and among others."""
    index_R1 = torch.from_numpy(targets_R)[:, None].to(logits_RV.device)
    found: npt.NDArray[np.float32] = (
        torch.log_softmax(logits_RV, dim=1).gather(1, index_R1)[:, 0].cpu().numpy()
    )
    return found
