"""What the scheduler does: random traces (tests/harness/scheduler_trace.py), and what they leave open."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_trace import VOCAB, Limits, Request, Trace

from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.scheduler import Scheduler, SchedulerOutput
from treadle_worker.scoring import Scoring
from treadle_worker.sequence import Sequence
from treadle_worker.speculation import Speculation


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    limits = Limits(
        num_blocks=draw(st.integers(6, 20)),
        block_size=draw(st.sampled_from([1, 2, 4])),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(6, 24)),
        enable_prefix_caching=draw(st.booleans()),
        speculation=Speculation(draw(st.integers(0, 4)), max_rows=24, min_ngram=1),
        max_score_rows=draw(st.integers(1, 12)),
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
                first=draw(st.none() | st.integers(1, length - 1)) if length > 1 else None,
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
    requests += [
        replace(one, first=rng.randrange(1, len(one.prompt)), arrives=rng.randrange(60))
        for one in requests[::2]
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
        "rows": trace.num_rows,
        "steps full of rows": trace.num_full_steps,
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


def scored(tokens: list[int], first: int, arrival: int) -> Sequence:
    sequence = sequence_of(tokens[:-1], arrival)
    sequence.scoring = Scoring(tokens, first)
    return sequence


def test_rows_of_logits_go_by_rank_and_nobody_is_admitted_when_they_are_used_up():
    scheduler = Limits(num_blocks=100, max_num_batched_tokens=64, max_score_rows=8).scheduler()
    first, second, third = scored([1] * 13, 1, 0), scored([2] * 23, 11, 1), scored([3] * 6, 1, 2)
    for sequence in (first, second, third):
        scheduler.add(sequence)
    steps = []
    while scheduler.num_running or scheduler.num_waiting:
        output = scheduler.schedule()
        steps.append({s.arrival: n for s, n in output.num_scheduled_tokens.items()})
        for sequence, num_tokens in output.num_scheduled_tokens.items():
            rows = sequence.scoring.num_rows(sequence.num_computed_tokens, num_tokens)
            sequence.num_computed_tokens += num_tokens
            sequence.scoring.take(sequence.scoring.targets(rows), sequence.scoring.targets(rows))
            if sequence.num_uncomputed_tokens == 0:
                scheduler.finish(sequence)
    assert steps == [{0: 8}, {0: 4, 1: 14}, {1: 8}, {2: 5}]
