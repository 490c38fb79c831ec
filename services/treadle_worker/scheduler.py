"""Which tokens the next step computes: one budget for prefill chunks and decodes, over plain integers.

Decodes come first, so that a long prompt never stops the tokens of others. What is left of the budget goes
to prompts, by rank: higher priority, then earlier arrival; where others decode, or another engine waits for
the device, no more than fits into `max_inter_token_ms` by what steps took so far (step_time.py). A prompt
that does not fit goes on in the next step; of texts that are scored, a step takes no more than have
`max_score_rows` rows of logits. Last, while the step is small, decodes get drafts to check; a draft takes
nothing from anybody: only what is left of the budget and of the blocks.

When blocks run out, the sequence of the worst rank is preempted: its blocks are freed, and its tokens are
computed anew when there is room again.

Why it always makes progress: the best-ranked sequence is preempted by nobody, decodes leave it at least
one token of the budget (there are at most as many sequences as tokens), nobody is admitted before it, the
first prompt of a step gets MIN_CHUNK tokens whatever they take, and with nothing else running it fits, since
`add` refuses what the whole cache could not hold.

What that means for priorities: within one priority nobody is overtaken, so everybody's turn comes. Between
priorities it is strict: as long as requests of a higher priority keep seats, blocks or budget full, lower
ones wait, and running ones are preempted. Nobody ages into a higher priority: what starves ends with its
deadline, and keeping urgent requests few is the gateway's part (its limits of tenants).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from treadle_worker.block_manager import BlockManager
from treadle_worker.sequence import Sequence, SequenceStatus
from treadle_worker.speculation import Speculation
from treadle_worker.step_time import PrefillLimit, StepTime, num_keys


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work: how many tokens of which sequence, in the order in which they are computed."""

    num_scheduled_tokens: dict[Sequence, int] = field(default_factory=dict)
    num_tokens: int = 0
    """Their sum."""
    num_prefill_tokens: int = 0
    num_prefill_keys: int = 0
    """Pairs of a prompt's token in the step and one that it attends to."""
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    """Tokens to check behind a sequence's own; they are among its scheduled ones."""
    admitted: list[Sequence] = field(default_factory=list)
    """Scheduled for the first time."""
    preempted: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Puts the sequence at the end of the step."""
        self.num_scheduled_tokens[sequence] = num_tokens
        self.num_tokens += num_tokens

    def add_prefill(self, sequence: Sequence, num_tokens: int) -> None:
        """Puts a chunk of a prompt at the end of the step."""
        self.add(sequence, num_tokens)
        self.num_prefill_tokens += num_tokens
        self.num_prefill_keys += num_keys(sequence.num_computed_tokens, num_tokens)

    def add_draft(self, sequence: Sequence, draft: list[int]) -> None:
        """Has the draft of a sequence in the step checked with it."""
        self.drafts[sequence] = draft
        self.num_scheduled_tokens[sequence] += len(draft)
        self.num_tokens += len(draft)

    def remove(self, sequence: Sequence) -> None:
        """Takes the sequence out of the step, if it is there."""
        self.num_tokens -= self.num_scheduled_tokens.pop(sequence, 0)


class Scheduler:
    """Owns the waiting and the running sequences, and is the only one to move blocks for them."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_inter_token_ms: float = 0.0,
        speculation: Speculation | None = None,
        max_score_rows: int = 256,
    ) -> None:
        if max_num_seqs > max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({max_num_seqs}): each running sequence needs a token a step"
            )
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_inter_token_ms = max_inter_token_ms
        """What a step with decodes, or on a shared device, should take at most; 0: whatever its budget
        takes."""
        self.max_score_rows = max_score_rows
        """Rows of logits of scored texts in one step; those that lack a single token come on top."""
        self.step_time = StepTime()
        self.speculation = speculation or Speculation()
        self.num_preemptions = 0
        self.num_chunked_prefills = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._running: list[tuple[tuple[int, int], Sequence]] = []  # by rank, the best first
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap; finished ones are skipped
        self._num_waiting = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none, preempted ones included."""
        return self._num_waiting

    @property
    def max_num_tokens(self) -> int:
        """The longest sequence that the cache holds. The last token of one is never computed."""
        return self.block_manager.num_blocks * self.block_manager.block_size + 1

    def running(self) -> Iterator[Sequence]:
        """The running sequences, best rank first."""
        return (sequence for _, sequence in self._running)

    def add(self, sequence: Sequence) -> None:
        """Lets the sequence wait for its turn.

        Raises ValueError where the whole cache could not hold its tokens.
        """
        if sequence.num_tokens >= self.max_num_tokens:
            raise ValueError(
                f"{sequence.num_tokens} tokens do not fit the cache of "
                f"{self.block_manager.num_blocks} blocks of {self.block_manager.block_size}"
            )
        self._wait(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends the sequence and frees its blocks, whether it waits or runs."""
        if sequence.status is SequenceStatus.RUNNING:
            del self._running[bisect_left(self._running, (sequence.rank,))]
            self.block_manager.free(sequence)
        elif not sequence.is_finished:
            self._num_waiting -= 1
        sequence.status = SequenceStatus.FINISHED
        if len(self._waiting) > 2 * self._num_waiting + 16:
            self._waiting = [entry for entry in self._waiting if not entry[1].is_finished]
            heapq.heapify(self._waiting)

    def schedule(self, *, is_shared: bool = False) -> SchedulerOutput:
        """Chooses the next step's tokens, and gives each sequence the blocks that they need.

        `is_shared`: another engine uses the device, too.
        """
        output = SchedulerOutput()
        started = self._schedule_decodes(output)
        self._schedule_prefills(output, started, is_shared=is_shared)
        self._schedule_drafts(output)
        return output

    def verified(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """A step checked the sequence's draft: learns from it, and takes back blocks of what was rejected."""
        if sequence.drafting is not None:
            sequence.drafting.verified(num_draft_tokens, num_accepted_tokens)
        self.block_manager.trim(sequence)

    def observe(self, output: SchedulerOutput, took_ms: float) -> None:
        """The step took so long."""
        if output.num_tokens:
            self.step_time.observe(output.num_prefill_tokens, output.num_prefill_keys, took_ms)

    def _schedule_decodes(self, output: SchedulerOutput) -> list[Sequence]:
        """Schedules every running sequence that lacks one token; returns those that lack more, best first."""
        started: list[Sequence] = []
        running, blocks, scheduled = self._running, self.block_manager, output.num_scheduled_tokens
        index = 0
        while index < len(running):  # preemption shortens the list from its end
            sequence = running[index][1]
            index += 1
            if len(sequence.token_ids) - sequence.num_computed_tokens != 1:
                started.append(sequence)
            elif blocks.has_room(sequence) or self._make_room(sequence, output):
                scheduled[sequence] = 1
        output.num_tokens = len(scheduled)
        return started

    def _make_room(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Gives the sequence a block for its next token; False where it was preempted for lack of one."""
        while not self.block_manager.can_append(sequence):
            victim = self._running[-1][1]
            self._preempt(victim, output)
            if victim is sequence:
                return False
        self.block_manager.append(sequence)
        return True

    def _schedule_prefills(
        self, output: SchedulerOutput, started: list[Sequence], *, is_shared: bool
    ) -> None:
        """Gives what is left of the budget to running and waiting prompts by rank."""
        started.reverse()
        limit = (
            PrefillLimit(self.step_time, self.max_inter_token_ms)
            if self.max_inter_token_ms and (output.num_scheduled_tokens or is_shared)
            else None
        )
        blocked = False  # nobody overtakes a waiting sequence that has no room
        rows = self.max_score_rows
        while (budget := self.max_num_batched_tokens - output.num_tokens) > 0:
            if limit is not None and limit.is_reached:
                return
            while started and (
                started[-1].status is not SequenceStatus.RUNNING or started[-1] in output.num_scheduled_tokens
            ):
                started.pop()
            sequence = None if blocked else self._first_waiting()
            if sequence is not None and (not started or sequence.rank < started[-1].rank):
                if (sequence.scoring is not None and not rows) or not self._admit(sequence, output):
                    blocked = True
                    continue
                budget = self.max_num_batched_tokens - output.num_tokens
            elif started:
                sequence = started.pop()
            else:
                return
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if (scoring := sequence.scoring) is not None:
                num_tokens = scoring.num_tokens(sequence.num_computed_tokens, num_tokens, rows)
                if not num_tokens:
                    continue
            if limit is not None:
                num_tokens = limit.num_tokens(sequence.num_computed_tokens, num_tokens)
                limit.take(sequence.num_computed_tokens, num_tokens)
            if scoring is not None:
                rows -= scoring.num_rows(sequence.num_computed_tokens, num_tokens)
            self.num_chunked_prefills += num_tokens < sequence.num_uncomputed_tokens
            output.add_prefill(sequence, num_tokens)

    def _schedule_drafts(self, output: SchedulerOutput) -> None:
        """Gives decodes drafts to check, by rank, from the budget and the blocks that are left."""
        most = min(self.max_num_batched_tokens, self.speculation.max_rows)
        if not self.speculation.num_speculative_tokens or output.num_tokens >= most:
            return
        blocks, longest = self.block_manager, self.speculation.num_speculative_tokens
        for sequence in self.running():
            drafting = sequence.drafting
            if drafting is None or sequence.num_uncomputed_tokens != 1:
                continue
            # A draft of n tokens gives up to n + 1.
            room = min(longest, most - output.num_tokens, sequence.max_num_tokens - sequence.num_tokens - 1)
            if not blocks.can_append(sequence, room):
                room = min(room, len(sequence.block_table) * blocks.block_size - sequence.num_tokens)
            draft = self.speculation.draft(
                drafting, sequence.token_ids, num_rows=output.num_tokens, room=room
            )
            if draft:
                blocks.append(sequence, len(draft))
                output.add_draft(sequence, draft)

    def _admit(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Starts the first waiting sequence, if there is room.

        Room is made by preempting sequences of strictly lower priority, where that can suffice. A block
        for each running sequence is left over: the new one would otherwise be preempted a few steps on.
        """
        while not self._has_room(sequence, prefix := self.block_manager.find_prefix(sequence)):
            if not self._may_make_room(sequence, prefix):
                return False
            victim = self._running[-1][1]
            output.remove(victim)
            self._preempt(victim, output)
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        if sequence.status is SequenceStatus.WAITING:
            num_cached = len(prefix) * self.block_manager.block_size
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self.prefix_cache_queries += sequence.num_prompt_tokens
            self.prefix_cache_hits += sequence.num_cached_tokens
            output.admitted.append(sequence)
        self.block_manager.allocate(sequence, prefix)
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, (sequence.rank, sequence))
        return True

    def _has_room(self, sequence: Sequence, prefix: list[int]) -> bool:
        reserve = len(self._running)
        return reserve < self.max_num_seqs and self.block_manager.can_allocate(
            sequence, prefix, reserve=reserve
        )

    def _may_make_room(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether preempting all sequences of lower priority could let this one in."""
        if not self._running or self._running[-1][1].priority >= sequence.priority:
            return False
        lower = [s for s in self.running() if s.priority < sequence.priority]
        gained = sum(len(s.block_table) for s in lower)
        return self.block_manager.can_allocate(
            sequence, prefix, reserve=len(self._running) - len(lower) - gained
        )

    def _preempt(self, sequence: Sequence, output: SchedulerOutput) -> None:
        popped = self._running.pop()[1]
        assert popped is sequence, "the worst rank is preempted"
        self.block_manager.free(sequence)
        self.num_preemptions += 1
        output.preempted.append(sequence)
        self._wait(sequence, SequenceStatus.PREEMPTED)

    def _wait(self, sequence: Sequence, status: SequenceStatus = SequenceStatus.WAITING) -> None:
        sequence.status = status
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        self._num_waiting += 1

    def _first_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].is_finished:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None
