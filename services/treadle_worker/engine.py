"""The engine: requests in, tokens and scores out, one step at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from collections.abc import Sequence as ListOf
from itertools import count
from typing import Protocol

import torch

from treadle_worker.admission import check_request, check_task
from treadle_worker.batch import ScheduledChunk
from treadle_worker.device_sharing import DeviceSharing
from treadle_worker.engine_protocol import (
    AddRequest,
    AddTask,
    DeviceMemory,
    EngineStats,
    FinishReason,
    Ready,
    SequenceOutput,
    StepOutputs,
    Task,
    TaskOutput,
)
from treadle_worker.penalties import TokenCounts, TokenHistory, has_penalties
from treadle_worker.sampler import Sample, Sampler, SampleRow
from treadle_worker.scheduler import Scheduler, SchedulerOutput
from treadle_worker.score_tasks import ScoreTasks
from treadle_worker.sequence import Sequence

NOT_FINITE = "the model's logits are not finite"


class Runner(Protocol):
    """What computes logits: the model runner, or a mock of it."""

    def run(self, chunks: ListOf[ScheduledChunk]) -> torch.Tensor:
        """Float32 logits [their `num_logits` together, vocabulary], in the chunks' order.

        Writes the keys and values of every chunk's tokens into the cache. Logits hold until the next run.
        """
        ...

    def close(self) -> None:
        """Gives back all memory; nothing is run after."""
        ...


class Engine:
    """Continuous batching over a paged cache: `step` is schedule, run, sample, postprocess.

    A request that cannot be run ends alone, as an output with finish_reason "error", and so does a task, as
    one with an error. An exception out of the runner says nothing about any one request: it leaves `step`,
    and the engine must not go on.
    """

    tasks: tuple[Task, ...] = ("score",)
    """What else than generation can be asked of it."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        *,
        vocab_size: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
        device_memory: Callable[[], DeviceMemory] = DeviceMemory,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self._clock = clock
        self._device_memory = device_memory
        self.vocab_size = vocab_size
        self.max_model_len = min(max_model_len, scheduler.max_num_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._histories: dict[Sequence, TokenHistory] = {}
        self._undelivered: list[SequenceOutput] = []
        self._task_outputs: list[TaskOutput] = []
        """Not delivered yet."""
        self._sharing = DeviceSharing(clock)
        self._arrivals = count()
        self._scores = ScoreTasks(scheduler, self._arrivals)
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_commands = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    def ready(self) -> Ready:
        """What the I/O process is told of it."""
        blocks = self.scheduler.block_manager
        return Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            num_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
            max_num_seqs=self.scheduler.max_num_seqs,
            process_id=os.getpid(),
            device_memory=self.stats().device_memory,
            tasks=list(self.tasks),
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self._sequences or self._undelivered or self._scores or self._task_outputs)

    def add_request(self, request: AddRequest) -> None:
        """Takes a request in. One with an id that is there already replaces the other.

        What cannot be run, and what needs no further token, is answered by the next step.
        """
        self._num_commands += 1
        self._drop(request.request_id)
        if error := check_request(request, self.vocab_size, self.max_model_len):
            self._undelivered.append(_failure(request.request_id, len(request.output_token_ids), error))
            return
        sequence = Sequence(
            request_id=request.request_id,
            token_ids=request.prompt_token_ids + request.output_token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
            arrival=next(self._arrivals),
            priority=request.priority,
            cache_salt=request.cache_salt,
            max_num_tokens=min(
                len(request.prompt_token_ids) + request.sampling.max_new_tokens, self.max_model_len
            ),
            drafting=self.scheduler.speculation.start(),
        )
        if (reason := self._finish_reason(sequence)) is not None:
            self._undelivered.append(_output(sequence, [], reason))
            return
        if has_penalties(request.sampling):
            self._histories[sequence] = TokenHistory(request.prompt_token_ids, request.output_token_ids)
        self._sequences[request.request_id] = sequence
        self._num_prompt_tokens += sequence.num_prompt_tokens
        self.scheduler.add(sequence)

    def add_task(self, task: AddTask) -> None:
        """Takes a task in, as `add_request` does a request. What cannot be computed is answered by the next
        step."""
        self._num_commands += 1
        self._drop(task.request_id)
        error = (
            check_task(task, self.vocab_size, self.max_model_len)
            if task.task in self.tasks
            else f"a model that generates cannot {task.task}"
        )
        if error:
            self._task_outputs.append(TaskOutput(request_id=task.request_id, error=error))
        else:
            self._scores.add(task)

    def abort(self, request_id: str) -> None:
        """Drops a request or a task, if it is there; nothing more is said of it."""
        self._num_commands += 1
        self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._undelivered = [output for output in self._undelivered if output.request_id != request_id]
        self._task_outputs = [output for output in self._task_outputs if output.request_id != request_id]
        if (sequence := self._sequences.get(request_id)) is not None:
            self._finish(sequence)
        self._scores.drop(request_id)

    def step(self) -> StepOutputs:
        """Computes one batch, and returns what it made and what was decided since the last step."""
        scheduled_at = self._clock()
        scheduled = self.scheduler.schedule(is_shared=self._sharing.is_shared)
        outputs, self._undelivered = self._undelivered, []
        admitted = [
            sequence.request_id
            for sequence in scheduled.admitted
            if sequence.scoring is None or self._scores.begins(sequence)
        ]
        if scheduled.num_scheduled_tokens:
            self._num_steps += 1
            if self._scores:
                outputs += self._run_with_scores(scheduled)
            else:
                outputs += self._postprocess(scheduled, self.runner.run(_chunks(scheduled)))
            self.scheduler.observe(scheduled, (self._clock() - scheduled_at) * 1000)
        task_outputs, self._task_outputs = self._task_outputs, []
        return StepOutputs(
            outputs=outputs,
            task_outputs=task_outputs,
            stats=self.stats(),
            scheduled_at=scheduled_at,
            admitted=admitted,
            preempted=[sequence.request_id for sequence in scheduled.preempted],
        )

    def report(self) -> StepOutputs:
        """What was decided since the last step, without another one."""
        outputs, self._undelivered = self._undelivered, []
        task_outputs, self._task_outputs = self._task_outputs, []
        return StepOutputs(
            outputs=outputs, task_outputs=task_outputs, stats=self.stats(), scheduled_at=self._clock()
        )

    def shares_device(self) -> None:
        """Another engine had the device until now, or is about to: for a while steps with prompts alone are
        kept as short as those with decodes."""
        self._sharing.handed_over()

    def close(self) -> None:
        """Drops every request, and gives back the memory of model and cache; takes nothing after."""
        for sequence in list(self._sequences.values()):
            self._finish(sequence)
        self._scores.clear()
        self._undelivered.clear()
        self._task_outputs.clear()
        self.runner.close()

    def stats(self) -> EngineStats:
        """Gauges of now, and counters since the start."""
        scheduler, blocks = self.scheduler, self.scheduler.block_manager
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_chunked_prefills=scheduler.num_chunked_prefills,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_task_inputs=self._scores.num_inputs,
            num_task_tokens=self._scores.num_tokens,
            num_commands=self._num_commands,
            device_memory=self._device_memory(),
        )

    def _run_with_scores(self, scheduled: SchedulerOutput) -> list[SequenceOutput]:
        """Computes the step with its scored sequences last, and takes their rows of logits from its end."""
        scored = self._scores.take_out(scheduled)
        chunks = [chunk for _, chunk in scored]
        logits = self.runner.run(_chunks(scheduled) + chunks)
        num_drawn = max(0, len(logits) - sum(chunk.num_logits for chunk in chunks))
        self._task_outputs += self._scores.advance(scored, logits[num_drawn:])
        return self._postprocess(scheduled, logits[:num_drawn])

    def _postprocess(self, scheduled: SchedulerOutput, logits: torch.Tensor) -> list[SequenceOutput]:
        """Samples, and moves every sequence of the step forward."""
        drafts, histories = scheduled.drafts, self._histories
        sampled: list[Sequence] = []
        rows: list[SampleRow] = []
        for sequence, num_tokens in scheduled.num_scheduled_tokens.items():
            draft = drafts.get(sequence) if drafts else None
            sequence.num_computed_tokens += num_tokens if draft is None else num_tokens - len(draft)
            if sequence.num_computed_tokens < len(sequence.token_ids):
                continue
            sampled.append(sequence)
            history = histories.get(sequence) if histories else None
            rows.append(SampleRow(sequence.sampling, sequence.num_output_tokens, history))
            if draft is not None:
                rows += _draft_rows(rows[-1], draft)
        if len(logits) != len(rows):
            raise RuntimeError(
                f"the runner gave {len(logits)} rows of logits where {len(rows)} are drawn from"
            )
        samples = self.sampler.sample(logits, rows)
        outputs: list[SequenceOutput] = []
        row = 0
        for sequence in sampled:
            draft = drafts.get(sequence) if drafts else None
            end = row + 1 if draft is None else row + 1 + len(draft)
            self._advance(sequence, samples[row:end], draft, outputs)
            row = end
        return outputs

    def _advance(
        self,
        sequence: Sequence,
        samples: list[Sample | None],
        draft: list[int] | None,
        outputs: list[SequenceOutput],
    ) -> None:
        """Appends the token that was drawn, and the next ones as long as the draft had foreseen them.

        What was drawn behind a draft's token holds if that token is the one that was drawn there: then it
        was computed and drawn from what it would have been without a draft, and is the same.

        Only here are blocks made findable: logits that are finite are the sign that all keys and values
        before them are sound.
        """
        taken: list[Sample] = []
        reason: FinishReason | None = None
        for sample in samples:
            if sample is None:
                reason = "error"
                break
            self.scheduler.block_manager.commit(sequence)
            self._append(sequence, sample.token_id)
            taken.append(sample)
            reason = self._finish_reason(sequence)
            place = len(taken) - 1
            if reason is not None or draft is None or draft[place : place + 1] != [sample.token_id]:
                break
            sequence.num_computed_tokens += 1
        if draft is not None:
            self._verified(sequence, len(draft), max(0, len(taken) - 1))
        if reason is not None:
            self._finish(sequence)
        if reason != "error":
            outputs.append(_output(sequence, taken, reason))
            return
        if taken:
            outputs.append(_output(sequence, taken, None))
        outputs.append(_failure(sequence.request_id, sequence.num_output_tokens, NOT_FINITE))

    def _append(self, sequence: Sequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        self._num_output_tokens += 1
        if (history := self._histories.get(sequence)) is not None:
            history.append(token_id)

    def _verified(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self._num_draft_tokens += num_draft_tokens
        self._num_accepted_tokens += num_accepted_tokens
        self.scheduler.verified(sequence, num_draft_tokens, num_accepted_tokens)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params, token_ids = sequence.sampling, sequence.token_ids
        if (
            token_ids[-1] in params.stop_token_ids
            and len(token_ids) - sequence.num_prompt_tokens > params.min_new_tokens
        ):
            return "stop_token"
        return "length" if len(token_ids) >= sequence.max_num_tokens else None

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request_id]
        self._histories.pop(sequence, None)


def _chunks(scheduled: SchedulerOutput) -> list[ScheduledChunk]:
    chunks, drafts = [], scheduled.drafts
    for sequence, num_tokens in scheduled.num_scheduled_tokens.items():
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        token_ids, num_logits = sequence.token_ids[start:end], int(end >= len(sequence.token_ids))
        if drafts and (draft := drafts.get(sequence)) is not None:
            token_ids, num_logits = token_ids + draft, 1 + len(draft)
        chunks.append(ScheduledChunk(token_ids, start, sequence.block_table, num_logits))
    return chunks


def _draft_rows(last: SampleRow, draft: list[int]) -> list[SampleRow]:
    """What is drawn behind each token of the draft: `last` is what is drawn before it."""
    history = last.history
    assert not isinstance(history, TokenCounts), "a sequence's history is its own"
    return [
        SampleRow(
            last.params,
            last.position + place,
            None if history is None else history.counts_after(draft[:place]),
        )
        for place in range(1, len(draft) + 1)
    ]


def _output(sequence: Sequence, taken: list[Sample], reason: FinishReason | None) -> SequenceOutput:
    """What the newest tokens did; without any, the end of a sequence that needs no further one."""
    return SequenceOutput(
        request_id=sequence.request_id,
        first_index=len(sequence.token_ids) - sequence.num_prompt_tokens - len(taken),
        token_ids=[sample.token_id for sample in taken],
        logprobs=None
        if sequence.sampling.logprobs is None
        else [sample.logprobs for sample in taken if sample.logprobs is not None] or None,
        finish_reason=reason,
        stop_token_id=sequence.token_ids[-1] if reason == "stop_token" else None,
        num_cached_tokens=sequence.num_cached_tokens,
    )


def _failure(request_id: str, first_index: int, error: str) -> SequenceOutput:
    return SequenceOutput(
        request_id=request_id, first_index=first_index, token_ids=[], finish_reason="error", error=error
    )
