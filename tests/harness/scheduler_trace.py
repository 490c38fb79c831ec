"""Scheduler and block manager together over random traces, with what must hold checked at every step.

The cache is simulated: a slot holds a digest of the salt and of every token up to its own, so that a block
which was lost, shared too early, overwritten or given to another tenant shows as a wrong digest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from treadle_worker.block_manager import BlockManager
from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.scheduler import Scheduler, SchedulerOutput
from treadle_worker.scoring import Scoring
from treadle_worker.sequence import Sequence, SequenceStatus
from treadle_worker.speculation import Speculation

VOCAB = 5


@dataclass(frozen=True)
class Request:
    """What a trace asks for, and when."""

    arrives: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    priority: int = 0
    salt: str = ""
    aborted: int | None = None
    """Steps from its arrival."""
    first: int | None = None
    """Where what is scored begins in the prompt; None: tokens are drawn behind it."""


@dataclass(frozen=True)
class Limits:
    num_blocks: int = 12
    block_size: int = 4
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 16
    enable_prefix_caching: bool = True
    speculation: Speculation | None = None
    max_score_rows: int = 8

    def scheduler(self) -> Scheduler:
        return Scheduler(
            BlockManager(self.num_blocks, self.block_size, enable_prefix_caching=self.enable_prefix_caching),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            speculation=self.speculation,
            max_score_rows=self.max_score_rows,
        )


def chain(salt: str, tokens: list[int]) -> list[int]:
    """What the slots of these tokens must hold: each depends on all before it."""
    digests, digest = [], hash(salt)
    for token in tokens:
        digest = hash((digest, token))
        digests.append(digest)
    return digests


def alone(request: Request) -> list[int]:
    """The tokens that the request must end with, whatever else runs."""
    tokens = list(request.prompt)
    if request.first is not None:
        return tokens[:-1]
    for _ in range(request.max_new_tokens):
        tokens.append(chain(request.salt, tokens)[-1] % VOCAB)
    return tokens


def scores_alone(request: Request) -> bytes:
    """What the scored request must end with: of each row the digest of all tokens before, and the token."""
    scoring = Scoring(request.prompt, request.first)
    rows = np.array(chain(request.salt, list(request.prompt))[request.first - 1 : -1]) & 0xFFFF
    scoring.take(rows, scoring.targets(len(rows)))
    return scoring.result


class Trace:
    """Runs requests through a scheduler and checks each step."""

    def __init__(self, limits: Limits, requests: list[Request]) -> None:
        self.limits = limits
        self.scheduler = limits.scheduler()
        self.blocks = self.scheduler.block_manager
        self.slots = [[0] * limits.block_size for _ in range(limits.num_blocks)]
        self.requests = requests
        self.sequences: dict[Sequence, Request] = {}
        self.finished: dict[Sequence, Request] = {}
        self.num_aborted = 0
        self.num_accepted = 0
        self.num_rejected = 0
        self.num_rows = 0
        """Rows of logits of scored texts."""
        self.num_full_steps = 0
        """Steps with as many of them as one may have."""

    def run(self) -> None:
        steps = 0
        coming = sorted(self.requests, key=lambda request: request.arrives)
        aborts: dict[int, list[Sequence]] = {}
        while coming or self.sequences:
            while coming and coming[0].arrives <= steps:
                request = coming.pop(0)
                scored = request.first is not None
                tokens = list(request.prompt[:-1] if scored else request.prompt)
                sequence = Sequence(
                    request_id=str(len(self.sequences)),
                    token_ids=tokens,
                    num_prompt_tokens=len(tokens),
                    sampling=SamplingParams(max_new_tokens=request.max_new_tokens),
                    arrival=len(self.requests) - len(coming),
                    priority=request.priority,
                    cache_salt=request.salt,
                    max_num_tokens=len(request.prompt) + request.max_new_tokens,
                    drafting=None if scored else self.scheduler.speculation.start(),
                    scoring=Scoring(request.prompt, request.first) if scored else None,
                )
                self.scheduler.add(sequence)
                self.sequences[sequence] = request
                if request.aborted is not None:
                    aborts.setdefault(steps + request.aborted, []).append(sequence)
            for sequence in aborts.pop(steps, []):
                if self.sequences.pop(sequence, None) is not None:
                    self.scheduler.finish(sequence)
                    self.num_aborted += 1
            self.step()
            steps += 1
            assert steps < 20_000, "somebody never finishes"
        self.check_blocks()
        assert self.blocks.num_free_blocks == self.limits.num_blocks

    def step(self) -> None:
        status = {sequence: sequence.status for sequence in self.sequences}
        decoding = [
            s for s, was in status.items() if was is SequenceStatus.RUNNING and s.num_uncomputed_tokens == 1
        ]
        output = self.scheduler.schedule()
        assert bool(output.num_scheduled_tokens) == bool(self.sequences), "a step that does nothing"
        self.check_blocks()
        self.check_output(output, status, decoding)
        rows = {
            sequence: sequence.scoring.num_rows(sequence.num_computed_tokens, num_tokens)
            for sequence, num_tokens in output.num_scheduled_tokens.items()
            if sequence.scoring is not None
        }
        self.check_rows(rows, output)
        for sequence, num_tokens in output.num_scheduled_tokens.items():
            self.compute(sequence, num_tokens, output.drafts.get(sequence, []))
        for sequence in list(output.num_scheduled_tokens):
            if sequence.scoring is not None:
                self.score(sequence, rows[sequence])
            elif sequence.num_uncomputed_tokens == 0:
                self.advance(sequence, output.drafts.get(sequence, []))

    def check_rows(self, rows: dict[Sequence, int], output: SchedulerOutput) -> None:
        """Of those that lack more than one token there are no more than one step may have."""
        counted = sum(count for one, count in rows.items() if output.num_scheduled_tokens[one] > 1)
        assert counted <= self.limits.max_score_rows
        assert sum(rows.values()) <= self.limits.max_score_rows + self.limits.max_num_seqs
        self.num_rows += sum(rows.values())
        self.num_full_steps += counted == self.limits.max_score_rows
        for sequence in rows:
            assert sequence.num_computed_tokens <= sequence.scoring.first_row, "a row is swallowed"

    def score(self, sequence: Sequence, num_rows: int) -> None:
        if num_rows:
            digests = chain(sequence.cache_salt, sequence.token_ids[: sequence.num_computed_tokens])
            rows = np.array(digests[-num_rows:]) & 0xFFFF
            sequence.scoring.take(rows, sequence.scoring.targets(num_rows))
            self.blocks.commit(sequence)
        if sequence.num_uncomputed_tokens == 0:
            self.scheduler.finish(sequence)
            self.finished[sequence] = self.sequences.pop(sequence)

    def compute(self, sequence: Sequence, num_tokens: int, draft: list[int]) -> None:
        size, start = self.limits.block_size, sequence.num_computed_tokens
        wanted = chain(sequence.cache_salt, sequence.token_ids + draft)
        table = sequence.block_table
        held = [self.slots[table[i // size]][i % size] for i in range(start)]
        assert held == wanted[:start], "the cache holds something else"
        for i in range(start, start + num_tokens):
            assert self.blocks._hash_of[table[i // size]] is None, "a findable block is overwritten"
            self.slots[table[i // size]][i % size] = wanted[i]
        sequence.num_computed_tokens += num_tokens - len(draft)

    def advance(self, sequence: Sequence, draft: list[int]) -> None:
        accepted = 0
        for foreseen in [*draft, None]:
            self.blocks.commit(sequence)
            sequence.token_ids.append(chain(sequence.cache_salt, sequence.token_ids)[-1] % VOCAB)
            if sequence.num_output_tokens == sequence.sampling.max_new_tokens:
                break
            if sequence.token_ids[-1] != foreseen:
                break
            sequence.num_computed_tokens += 1
            accepted += 1
        self.num_accepted += accepted
        self.num_rejected += len(draft) - accepted
        if draft:
            self.scheduler.verified(sequence, len(draft), accepted)
        if sequence.num_output_tokens == sequence.sampling.max_new_tokens:
            self.scheduler.finish(sequence)
            self.finished[sequence] = self.sequences.pop(sequence)

    def check_blocks(self) -> None:
        """No block is lost, and none has more or fewer owners than it counts."""
        owners: Counter[int] = Counter()
        for sequence in self.sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            assert bool(sequence.block_table) == (sequence.status is SequenceStatus.RUNNING)
            owners.update(sequence.block_table)
        blocks = self.blocks
        assert blocks._ref_counts == [owners[block] for block in range(blocks.num_blocks)]
        assert set(blocks._free) == {b for b in range(blocks.num_blocks) if owners[b] == 0}
        findable = {name: b for b, name in enumerate(blocks._hash_of) if name is not None}
        assert blocks._block_of == findable

    def check_output(
        self,
        output: SchedulerOutput,
        status: dict[Sequence, SequenceStatus],
        decoding: list[Sequence],
    ) -> None:
        running = list(self.scheduler.running())
        waiting = [s for s in self.sequences if s.status is not SequenceStatus.RUNNING]
        assert self.scheduler.num_running == len(running) <= self.limits.max_num_seqs
        assert self.scheduler.num_waiting == len(waiting)
        assert output.num_tokens == sum(output.num_scheduled_tokens.values())
        assert output.num_tokens <= self.limits.max_num_batched_tokens
        assert running == sorted(running, key=lambda s: s.rank)
        for sequence, num_tokens in output.num_scheduled_tokens.items():
            assert sequence in running
            end = sequence.num_computed_tokens + num_tokens
            draft = output.drafts.get(sequence, [])
            assert sequence.num_computed_tokens < end <= sequence.num_tokens + len(draft)
            assert not draft or end == sequence.num_tokens + len(draft) < sequence.max_num_tokens
            assert len(sequence.block_table) * self.limits.block_size >= end
        for sequence in decoding:
            assert sequence in output.num_scheduled_tokens or sequence in output.preempted
        for sequence in output.preempted:
            # <=: one may come back at once, when it finds blocks to share that it had twice
            assert all(other.rank <= sequence.rank for other in running), "not the worst one was preempted"
        admitted = [s for s in running if status[s] is not SequenceStatus.RUNNING]
        if admitted and waiting:
            assert max(s.rank for s in admitted) < min(s.rank for s in waiting), "somebody was overtaken"
        best = min(self.sequences, key=lambda s: s.rank, default=None)
        if best is not None and best.status is SequenceStatus.RUNNING:
            assert best in output.num_scheduled_tokens, "the best one makes no progress"

    def check_answers(self) -> None:
        assert len(self.finished) + self.num_aborted == len(self.requests)
        for sequence, request in self.finished.items():
            assert sequence.token_ids == alone(request)
            if request.first is not None:
                assert sequence.scoring.result == scores_alone(request)
