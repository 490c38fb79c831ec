"""Scheduler and block manager together over random traces, with what must hold checked at every step.

The cache is simulated: a slot holds a digest of the salt and of every token up to its own, so that a block
which was lost, shared too early, overwritten or given to another tenant shows as a wrong digest.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle_worker.block_manager import BlockManager
from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.scheduler import Scheduler, SchedulerOutput
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


@dataclass(frozen=True)
class Limits:
    num_blocks: int = 12
    block_size: int = 4
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 16
    enable_prefix_caching: bool = True
    speculation: Speculation | None = None

    def scheduler(self) -> Scheduler:
        return Scheduler(
            BlockManager(self.num_blocks, self.block_size, enable_prefix_caching=self.enable_prefix_caching),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            speculation=self.speculation,
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
    for _ in range(request.max_new_tokens):
        tokens.append(chain(request.salt, tokens)[-1] % VOCAB)
    return tokens


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

    def run(self) -> None:
        steps = 0
        coming = sorted(self.requests, key=lambda request: request.arrives)
        aborts: dict[int, list[Sequence]] = {}
        while coming or self.sequences:
            while coming and coming[0].arrives <= steps:
                request = coming.pop(0)
                sequence = Sequence(
                    request_id=str(len(self.sequences)),
                    token_ids=list(request.prompt),
                    num_prompt_tokens=len(request.prompt),
                    sampling=SamplingParams(max_new_tokens=request.max_new_tokens),
                    arrival=len(self.requests) - len(coming),
                    priority=request.priority,
                    cache_salt=request.salt,
                    max_num_tokens=len(request.prompt) + request.max_new_tokens,
                    drafting=self.scheduler.speculation.start(),
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
        for sequence, num_tokens in output.num_scheduled_tokens.items():
            self.compute(sequence, num_tokens, output.drafts.get(sequence, []))
        for sequence in list(output.num_scheduled_tokens):
            if sequence.num_uncomputed_tokens == 0:
                self.advance(sequence, output.drafts.get(sequence, []))

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


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    limits = Limits(
        num_blocks=draw(st.integers(6, 20)),
        block_size=draw(st.sampled_from([1, 2, 4])),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(6, 24)),
        enable_prefix_caching=draw(st.booleans()),
        speculation=Speculation(draw(st.integers(0, 4)), max_rows=24, min_ngram=1),
    )
    room = limits.num_blocks * limits.block_size
    prefixes = [(1,) * 40, (2, 3) * 20]
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, min(30, room)))
        shared = draw(st.integers(0, length))
        suffix = draw(st.lists(st.integers(0, 1), min_size=length - shared, max_size=length - shared))
        requests.append(
            Request(
                arrives=draw(st.integers(0, 10)),
                prompt=draw(st.sampled_from(prefixes))[:shared] + tuple(suffix),
                max_new_tokens=draw(st.integers(1, min(20, room + 1 - length))),
                priority=draw(st.integers(0, 2)),
                salt=draw(st.sampled_from(["", "tenant"])),
                aborted=draw(st.none() | st.integers(0, 20)),
            )
        )
    return Trace(limits, requests)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(traces())
def test_random_traces(trace):
    trace.run()
    trace.check_answers()


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_crowded_trace(enable_prefix_caching):
    """The things that the checks are about happen: they are counted."""
    rng = random.Random(1)
    requests = [
        Request(
            arrives=rng.randrange(60),
            prompt=tuple([1, 2, 3] * 5)[: rng.randint(1, 15)]
            + tuple(rng.choices(range(VOCAB), k=rng.randint(1, 15))),
            max_new_tokens=rng.randint(1, 18),
            priority=rng.choice([0, 0, 1, 2]),
            salt=rng.choice(["", "a"]),
            aborted=rng.choice([None, None, None, 7]),
        )
        for _ in range(150)
    ]
    speculation = Speculation(num_speculative_tokens=4, min_ngram=1)
    trace = Trace(Limits(enable_prefix_caching=enable_prefix_caching, speculation=speculation), requests)
    trace.run()
    trace.check_answers()
    scheduler = trace.scheduler
    counts = {
        "preemptions": scheduler.num_preemptions,
        "chunks": scheduler.num_chunked_prefills,
        "aborted": trace.num_aborted,
        "accepted": trace.num_accepted,
        "rejected": trace.num_rejected,
        "prefix hits": scheduler.prefix_cache_hits,
    }
    print(counts)
    assert (counts.pop("prefix hits") > 0) == enable_prefix_caching
    assert min(counts.values()) > 0


def sequence_of(tokens: list[int], arrival: int = 0, priority: int = 0, salt: str = "") -> Sequence:
    return Sequence(
        request_id=str(arrival),
        token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(max_new_tokens=100),
        arrival=arrival,
        priority=priority,
        cache_salt=salt,
    )


def advance(scheduler: Scheduler, output: SchedulerOutput) -> None:
    for sequence, num_tokens in output.num_scheduled_tokens.items():
        sequence.num_computed_tokens += num_tokens
        if sequence.num_uncomputed_tokens == 0:
            scheduler.block_manager.commit(sequence)
            sequence.token_ids.append(0)


def test_a_long_prompt_does_not_stop_others():
    scheduler = Limits(num_blocks=100).scheduler()
    short, long = sequence_of([1, 2], 0), sequence_of([3] * 100, 1)
    scheduler.add(short)
    advance(scheduler, scheduler.schedule())
    scheduler.add(long)
    steps = 0
    while long.num_uncomputed_tokens > 1:
        output = scheduler.schedule()
        assert next(iter(output.num_scheduled_tokens.items())) == (short, 1)
        assert output.num_tokens == min(16, 1 + long.num_uncomputed_tokens)
        advance(scheduler, output)
        steps += 1
    assert steps == 7


def test_an_urgent_request_takes_the_place_of_lower_ones():
    scheduler = Limits(num_blocks=12, max_num_seqs=2).scheduler()
    older, younger, urgent = (
        sequence_of([1] * 4, 0),
        sequence_of([2] * 4, 1),
        sequence_of([3] * 8, 2, priority=1),
    )
    scheduler.add(older)
    scheduler.add(younger)
    advance(scheduler, scheduler.schedule())
    scheduler.add(urgent)
    output = scheduler.schedule()
    assert output.preempted == [younger]
    assert output.num_scheduled_tokens == {older: 1, urgent: 8}


def test_an_urgent_request_that_would_not_fit_preempts_nobody():
    scheduler = Limits(num_blocks=12, max_num_seqs=3).scheduler()
    scheduler.add(equal := sequence_of([1] * 15, 0, priority=1))
    advance(scheduler, scheduler.schedule())
    scheduler.add(lower := sequence_of([2] * 4, 1))
    advance(scheduler, scheduler.schedule())
    scheduler.add(sequence_of([3] * 40, 2, priority=1))
    output = scheduler.schedule()
    assert output.preempted == []
    assert output.num_scheduled_tokens == {equal: 1, lower: 1}


def test_many_aborted_ones_leave_nothing_behind():
    scheduler = Limits(num_blocks=4).scheduler()
    scheduler.add(first := sequence_of([1] * 16, 0))
    scheduler.schedule()
    waiting = [sequence_of([2], arrival) for arrival in range(1, 1001)]
    for sequence in waiting:
        scheduler.add(sequence)
    for sequence in waiting:
        scheduler.finish(sequence)
    assert scheduler.num_waiting == 0
    assert len(scheduler._waiting) < 20
    scheduler.finish(first)
    assert scheduler.num_running == 0


def test_what_can_never_run_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Limits(num_blocks=2).scheduler().add(sequence_of([1] * 9))
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Limits(max_num_seqs=20).scheduler()
