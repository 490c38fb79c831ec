"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListOf
from itertools import count, islice, zip_longest
from typing import Protocol

import torch

from treadle_worker.admission import check_request
from treadle_worker.batch import ScheduledChunk
from treadle_worker.engine_protocol import (
    AddRequest,
    EngineStats,
    FinishReason,
    SequenceOutput,
    StepOutputs,
)
from treadle_worker.penalties import TokenHistory, has_penalties
from treadle_worker.sampler import Sample, Sampler, SampleRow
from treadle_worker.scheduler import Scheduler, SchedulerOutput
from treadle_worker.sequence import Sequence


class Runner(Protocol):
    """What computes logits: the model runner, or a mock of it."""

    def run(self, chunks: ListOf[ScheduledChunk]) -> torch.Tensor:
        """Float32 logits [their `num_logits` together, vocabulary], in the chunks' order.

        Writes the keys and values of every chunk's tokens into the cache.
        """
        ...


class Engine:
    """Continuous batching over a paged cache: `step` is schedule, run, sample, postprocess.

    A request that cannot be run ends alone, as an output with finish_reason "error". An exception out of
    the runner says nothing about any one request: it leaves `step`, and the engine must not go on.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        *,
        vocab_size: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self._clock = clock
        self.vocab_size = vocab_size
        self.max_model_len = min(max_model_len, scheduler.max_num_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._histories: dict[Sequence, TokenHistory] = {}
        self._undelivered: list[SequenceOutput] = []
        self._arrivals = count()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_commands = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self._sequences or self._undelivered)

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

    def abort(self, request_id: str) -> None:
        """Drops a request, if it is there; nothing more is said of it."""
        self._num_commands += 1
        self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._undelivered = [output for output in self._undelivered if output.request_id != request_id]
        if (sequence := self._sequences.get(request_id)) is not None:
            self._finish(sequence)

    def step(self) -> StepOutputs:
        """Computes one batch, and returns what it made and what was decided since the last step."""
        scheduled_at = self._clock()
        scheduled = self.scheduler.schedule()
        outputs, self._undelivered = self._undelivered, []
        if scheduled.num_scheduled_tokens:
            self._num_steps += 1
            logits = self.runner.run(_chunks(scheduled))
            outputs += self._postprocess(scheduled, logits)
            self.scheduler.observe(scheduled, (self._clock() - scheduled_at) * 1000)
        return StepOutputs(
            outputs=outputs,
            stats=self.stats(),
            scheduled_at=scheduled_at,
            admitted=[sequence.request_id for sequence in scheduled.admitted],
            preempted=[sequence.request_id for sequence in scheduled.preempted],
        )

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
            num_commands=self._num_commands,
        )

    def _postprocess(self, scheduled: SchedulerOutput, logits: torch.Tensor) -> list[SequenceOutput]:
        """Samples, and moves every sequence of the step forward."""
        sampled: list[tuple[Sequence, list[int]]] = []
        rows: list[SampleRow] = []
        for sequence, num_tokens in scheduled.num_scheduled_tokens.items():
            draft = scheduled.drafts.get(sequence, [])
            sequence.num_computed_tokens += num_tokens - len(draft)
            if sequence.num_uncomputed_tokens == 0:
                sampled.append((sequence, draft))
                rows += self._rows(sequence, draft)
        if len(logits) != len(rows):
            raise RuntimeError(
                f"the runner gave {len(logits)} rows of logits where {len(rows)} are drawn from"
            )
        samples = iter(self.sampler.sample(logits, rows))
        outputs: list[SequenceOutput] = []
        for sequence, draft in sampled:
            outputs += self._advance(sequence, draft, list(islice(samples, len(draft) + 1)))
        return outputs

    def _rows(self, sequence: Sequence, draft: list[int]) -> Iterator[SampleRow]:
        """What is drawn behind the sequence's last token, and behind each of its draft."""
        params, position = sequence.sampling, sequence.num_output_tokens
        history = self._histories.get(sequence)
        yield SampleRow(params, position, history)
        for place in range(1, len(draft) + 1):
            counts = None if history is None else history.counts_after(draft[:place])
            yield SampleRow(params, position + place, counts)

    def _advance(
        self, sequence: Sequence, draft: list[int], samples: list[Sample | None]
    ) -> list[SequenceOutput]:
        """Appends the token that was drawn, and the next ones as long as the draft had foreseen them.

        What was drawn behind a draft's token holds if that token is the one that was drawn there: then it
        was computed and drawn from what it would have been without a draft, and is the same.

        Only here are blocks made findable: logits that are finite are the sign that all keys and values
        before them are sound.
        """
        taken: list[Sample] = []
        reason: FinishReason | None = None
        for sample, foreseen in zip_longest(samples, draft):
            if sample is None:
                reason = "error"
                break
            self.scheduler.block_manager.commit(sequence)
            self._append(sequence, sample.token_id)
            taken.append(sample)
            reason = self._finish_reason(sequence)
            if reason is not None or sample.token_id != foreseen:
                break
            sequence.num_computed_tokens += 1
        if draft:
            self._verified(sequence, len(draft), max(0, len(taken) - 1))
        if reason is not None:
            self._finish(sequence)
        if reason != "error":
            return [_output(sequence, taken, reason)]
        failure = _failure(
            sequence.request_id, sequence.num_output_tokens, "the model's logits are not finite"
        )
        return [_output(sequence, taken, None), failure] if taken else [failure]

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
        params = sequence.sampling
        if (
            sequence.num_output_tokens > params.min_new_tokens
            and sequence.token_ids[-1] in params.stop_token_ids
        ):
            return "stop_token"
        return "length" if sequence.num_tokens >= sequence.max_num_tokens else None

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request_id]
        self._histories.pop(sequence, None)


def _chunks(scheduled: SchedulerOutput) -> list[ScheduledChunk]:
    chunks = []
    for sequence, num_tokens in scheduled.num_scheduled_tokens.items():
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        draft = scheduled.drafts.get(sequence, [])
        token_ids = sequence.token_ids[start:end] + draft
        num_logits = 1 + len(draft) if end >= sequence.num_tokens else 0
        chunks.append(ScheduledChunk(token_ids, start, sequence.block_table, num_logits))
    return chunks


def _output(sequence: Sequence, taken: list[Sample], reason: FinishReason | None) -> SequenceOutput:
    """What the newest tokens did; without any, the end of a sequence that needs no further one."""
    logprobs = [sample.logprobs for sample in taken if sample.logprobs is not None]
    return SequenceOutput(
        request_id=sequence.request_id,
        first_index=sequence.num_output_tokens - len(taken),
        token_ids=[sample.token_id for sample in taken],
        logprobs=logprobs or None,
        finish_reason=reason,
        stop_token_id=sequence.token_ids[-1] if reason == "stop_token" else None,
        num_cached_tokens=sequence.num_cached_tokens,
    )


def _failure(request_id: str, first_index: int, error: str) -> SequenceOutput:
    return SequenceOutput(
        request_id=request_id, first_index=first_index, token_ids=[], finish_reason="error", error=error
    )
