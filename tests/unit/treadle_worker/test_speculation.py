"""Speculation changes no answer: over a model with habits, whose drafts are accepted and rejected."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from mock_engine import BROKEN, make_engine, request, run, tokens

from treadle_worker.block_manager import BlockManager
from treadle_worker.engine import Engine
from treadle_worker.engine_protocol import AddRequest, SamplingParams, SequenceOutput
from treadle_worker.scheduler import Scheduler
from treadle_worker.sequence import Sequence
from treadle_worker.speculation import PROBE_INTERVAL, NgramIndex, Speculation

EAGER = Speculation(num_speculative_tokens=4, max_rows=64)
HABIT = 0.8


def plain(outputs: list[SequenceOutput]) -> tuple[object, ...]:
    """The answer, however many steps it took."""
    said = tokens(outputs)
    logprobs = [each for output in outputs for each in output.logprobs or []]
    last = outputs[-1]
    return said, logprobs, last.finish_reason, last.stop_token_id, last.error


def speculating(**fields: object) -> Engine:
    return make_engine(**{"habit": HABIT, "speculation": EAGER, **fields})


def counts(engine: Engine) -> dict[str, int]:
    stats = engine.stats()
    return {
        "drafted": stats.num_draft_tokens,
        "accepted": stats.num_accepted_tokens,
        "rejected": stats.num_draft_tokens - stats.num_accepted_tokens,
        "steps": stats.num_steps,
        "preempted": stats.num_preemptions,
    }


def test_the_index_finds_what_a_search_finds():
    """The longest n-gram, the latest place, and what followed, through itself where it has to."""
    rng = random.Random(0)
    found = 0
    for _ in range(60):
        low = rng.randint(1, 3)
        index, count = NgramIndex(low, low + rng.randint(0, 3)), rng.randint(1, 6)
        said = [rng.randrange(3) for _ in range(rng.randint(0, 6))]
        for _ in range(40):
            expected: list[int] = []
            for n in range(min(index.max_ngram, len(said)), index.min_ngram - 1, -1):
                ends = [e for e in range(n, len(said)) if said[e - n : e] == said[len(said) - n :]]
                if ends:
                    grown = list(said)
                    for place in range(count):
                        grown.append(grown[ends[-1] + place])
                    expected = grown[len(said) :]
                    break
            assert index.propose(said, count) == expected
            found += bool(expected)
            said += [rng.randrange(3) for _ in range(rng.randint(1, 3))]
    print(f"{found} drafts of {60 * 40}")
    assert 500 < found < 60 * 40


def test_a_token_is_indexed_once():
    class Counted(list):
        reads = 0

        def __getitem__(self, place):
            Counted.reads += 1
            return super().__getitem__(place)

    index, said = NgramIndex(2, 4), Counted(range(20_000))
    index.propose(said, 4)
    whole = Counted.reads
    for token in range(100):
        said.append(token)
        index.propose(said, 4)
    print(f"{whole} reads of 20,000 tokens, {Counted.reads - whole} for 100 more")
    assert whole <= 4 * 20_000
    assert Counted.reads - whole <= 100 * 9


PARAMS = [
    {"temperature": 0.0},
    {"seed": 7},
    {"seed": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 20},
    {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    {"seed": 5, "repetition_penalty": 1.05, "presence_penalty": 0.2},
]


@pytest.mark.parametrize("fields", PARAMS, ids=str)
def test_the_same_answer_in_fewer_steps(fields):
    with_drafts, without = speculating(), make_engine(habit=HABIT)
    accepted = rejected = 0
    for index in range(12):
        each = request("r", [index, 2, 3], **({"max_new_tokens": 60} | fields))
        assert plain(run(with_drafts, each)["r"]) == plain(run(without, each)["r"])
    count = counts(with_drafts)
    print(count, f"{without.stats().num_steps} steps without")
    accepted, rejected = count["accepted"], count["rejected"]
    assert min(accepted, rejected) > 10
    assert count["steps"] < without.stats().num_steps - accepted / 2
    assert with_drafts.stats().num_output_tokens == 12 * 60


@pytest.mark.parametrize("minimum", [0, 20])
def test_a_stop_token_among_accepted_ones_ends_the_answer_there(minimum):
    inside = 0
    for index in range(40):
        prompt = random.Random(index).choices(range(9), k=30)  # which has the stop token, for drafts to find
        fields = {"max_new_tokens": 60, "temperature": 0.0, "min_new_tokens": minimum}
        free = tokens(run(make_engine(habit=HABIT, budget=64), request("r", prompt, **fields))["r"])
        each = request("r", prompt, stop_token_ids=(free[25],), **fields)
        engine = speculating(budget=64)
        outputs = run(engine, each)["r"]
        assert plain(outputs) == plain(run(make_engine(habit=HABIT, budget=64), each)["r"])
        assert outputs[-1].finish_reason == "stop_token" or len(tokens(outputs)) == 60
        assert len(tokens(outputs)) > minimum
        inside += outputs[-1].finish_reason == "stop_token" and len(outputs[-1].token_ids) > 1
    print(f"{inside} answers ended among accepted tokens")
    assert inside > 3


def test_lengths_and_the_context_end_an_answer_exactly():
    longest = accepted = 0
    for length in range(20, 45):
        for limit, total in ((100, length), (length + 3, 200)):
            engine = speculating(max_model_len=limit, habit=0.97)
            outputs = run(engine, request("r", [1, 2, 3], max_new_tokens=total, temperature=0.0))["r"]
            assert len(tokens(outputs)) == length
            assert outputs[-1].finish_reason == "length"
            accepted += counts(engine)["accepted"]
            longest = max(longest, *(len(output.token_ids) for output in outputs))
    print(f"{accepted} accepted, up to {longest} tokens a step")
    assert accepted > 50
    assert longest == 5


@pytest.mark.parametrize("delivered", [1, 17, 40])
@pytest.mark.parametrize("fields", PARAMS[1:4:2], ids=str)
def test_resumed_is_uninterrupted(delivered, fields):
    whole = request("r", [4, 5, 6], max_new_tokens=60, **fields)
    expected = run(make_engine(habit=HABIT), whole)["r"]
    engine = speculating()
    rest = run(engine, msgspec.structs.replace(whole, output_token_ids=tokens(expected)[:delivered]))["r"]
    assert tokens(rest) == tokens(expected)[delivered:]
    assert plain(rest)[1] == plain(expected)[1][delivered:]
    print(counts(engine))
    assert counts(engine)["accepted"] > 0


@pytest.mark.parametrize("caching", [True, False])
def test_crowded_is_alone(caching):
    """A cache too small for all, priorities, random parameters: everybody gets what they get alone."""
    rng = random.Random(6)
    requests = [
        request(
            str(index),
            [1, 2, 3, 4] * rng.randint(0, 4) + rng.choices(range(9), k=rng.randint(1, 12)),
            max_new_tokens=rng.randint(1, 45),
            temperature=rng.choice([0.0, 0.7]),
            seed=rng.getrandbits(64),
            presence_penalty=rng.choice([0.0, 0.3]),
            priority=rng.choice([0, 0, 1]),
            stop_token_ids=(45,),
            min_new_tokens=rng.choice([0, 10]),
        )
        for index in range(60)
    ]
    engine = speculating(num_blocks=22, caching=caching, budget=24)
    crowded = run(engine, *requests)
    for each in requests:
        alone = run(make_engine(caching=False, habit=HABIT), each)[each.request_id]
        assert plain(crowded[each.request_id]) == plain(alone)
    print(counts(engine), engine.stats().prefix_cache_hits)
    assert min(counts(engine).values()) > 0
    assert (engine.stats().prefix_cache_hits > 0) == caching


def test_only_accepted_tokens_are_ever_found_again():
    """After every step each findable block holds what its sequence says there."""
    engine = speculating(num_blocks=60, block_size=4)
    for index in range(6):
        engine.add_request(request(str(index), [index, 1, 2], max_new_tokens=90, temperature=0.6, seed=index))
    blocks, findable = engine.scheduler.block_manager, 0
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running():
            assert len(sequence.block_table) <= blocks.num_blocks_for(sequence.num_tokens)
            state = 0
            for place, token in enumerate(sequence.token_ids[: sequence.num_computed_tokens]):
                state = hash((state, token))
                assert engine.runner.slots[sequence.block_table[place // 4]][place % 4][0] == state
            findable += sequence.num_committed_blocks
            assert sequence.num_committed_blocks <= sequence.num_computed_tokens // 4
            for block in sequence.block_table[sequence.num_committed_blocks :]:
                assert blocks._hash_of[block] is None
    print(counts(engine), f"{findable} findable blocks looked at")
    assert counts(engine)["rejected"] > 20
    assert findable > 1000


def test_logits_that_break_behind_accepted_tokens_fail_at_their_own_token():
    """The draft brings a token of which the model breaks; what came before it was said all the same."""
    broken_inside = 0
    for index in range(60):
        bias = {BROKEN: 53.0}  # now drawn now and then
        each = request("r", [index, 1], max_new_tokens=90, seed=index, temperature=0.7, logit_bias=bias)
        engine = speculating()
        outputs = run(engine, each)["r"]
        assert plain(outputs) == plain(run(make_engine(habit=HABIT), each)["r"])
        broken_inside += outputs[-1].finish_reason == "error" and counts(engine)["accepted"] > 0
    print(f"{broken_inside} answers broke")
    assert broken_inside > 5


def sequence_of(said: list[int], arrival: int, speculation: Speculation) -> Sequence:
    return Sequence(
        request_id=str(arrival),
        token_ids=list(said),
        num_prompt_tokens=len(said),
        sampling=SamplingParams(max_new_tokens=100),
        arrival=arrival,
        drafting=speculation.start(),
    )


def started(num_blocks: int, speculation: Speculation, *said: list[int], budget: int = 32) -> Scheduler:
    """A scheduler whose sequences have all computed their prompts, drawn a 1, and seen good drafts."""
    scheduler = Scheduler(
        BlockManager(num_blocks, 4), max_num_seqs=8, max_num_batched_tokens=budget, speculation=speculation
    )
    for arrival, each in enumerate(said):
        scheduler.add(sequence_of(each, arrival, speculation))
    for sequence, num_tokens in scheduler.schedule().num_scheduled_tokens.items():
        sequence.num_computed_tokens += num_tokens
        sequence.token_ids.append(1)
        if sequence.drafting is not None:
            sequence.drafting.chance = 0.99
    return scheduler


REPEATING = [1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("num_blocks", "drafted"), [(6, [4, 4]), (5, [4, 0])])
def test_a_draft_takes_no_block_from_anybody(num_blocks, drafted):
    """Two sequences of 8 tokens in blocks of 4: each draft needs a third one."""
    scheduler = started(num_blocks, EAGER, REPEATING, REPEATING)
    output = scheduler.schedule()
    assert output.preempted == []
    assert [num_tokens - 1 for num_tokens in output.num_scheduled_tokens.values()] == drafted
    assert sum(len(draft) for draft in output.drafts.values()) == sum(drafted)
    for sequence, draft in output.drafts.items():
        sequence.num_computed_tokens += 1
        sequence.token_ids.append(2)
        scheduler.verified(sequence, len(draft), 0)
        assert len(sequence.block_table) == 3, "the ninth token needs it"
    assert scheduler.block_manager.num_free_blocks == num_blocks - 4 - sum(map(bool, drafted))


def test_blocks_of_a_rejected_draft_are_taken_back():
    scheduler = started(6, EAGER, [1] * 6)
    (sequence,) = scheduler.schedule().drafts
    assert len(sequence.block_table) == 3
    sequence.num_computed_tokens += 1
    sequence.token_ids.append(2)
    scheduler.verified(sequence, 4, 0)
    assert len(sequence.block_table) == 2
    assert scheduler.block_manager.num_free_blocks == 4


@pytest.mark.parametrize(
    ("speculation", "budget", "drafted"),
    [
        (Speculation(4, max_rows=64), 32, [4, 4, 4]),
        (Speculation(2, max_rows=64), 32, [2, 2, 2]),
        (Speculation(4, max_rows=64), 24, [4, 4, 4]),
        (Speculation(4, max_rows=9), 32, [4, 2, 0]),
        (Speculation(4, max_rows=3), 32, [0, 0, 0]),
        (Speculation(0, max_rows=64), 32, [0, 0, 0]),
    ],
    ids=str,
)
def test_drafts_keep_to_rows_and_budget(speculation, budget, drafted):
    scheduler = started(20, speculation, REPEATING, REPEATING, REPEATING, budget=budget)
    output = scheduler.schedule()
    assert [num_tokens - 1 for num_tokens in output.num_scheduled_tokens.values()] == drafted
    assert output.num_tokens == 3 + sum(drafted)


def test_a_prompt_takes_the_budget_before_drafts():
    scheduler = started(30, EAGER, REPEATING)
    scheduler.add(sequence_of([1] * 100, 5, EAGER))
    output = scheduler.schedule()
    assert list(output.num_scheduled_tokens.values()) == [1, 31]
    assert output.drafts == {}


def test_useless_drafts_end_and_are_tried_again():
    """In a step of eight rows: a sequence whose drafts fail makes fewer, then one now and then."""
    drafting = EAGER.start()
    assert drafting is not None
    lengths = []
    for _ in range(PROBE_INTERVAL * 5):
        draft = EAGER.draft(drafting, REPEATING, num_rows=8, room=4)
        lengths.append(len(draft))
        if draft:
            drafting.verified(len(draft), 0)
    print(lengths)
    assert lengths[0] == 1
    assert sum(lengths[20:]) == sum(map(bool, lengths[20:])) == 4
    for _ in range(25):
        drafting.verified(4, 4)
    assert len(EAGER.draft(drafting, REPEATING, num_rows=8, room=4)) == 4
    assert EAGER.draft(drafting, REPEATING, num_rows=61, room=9) != []
    assert EAGER.draft(drafting, REPEATING, num_rows=64, room=9) == []


def test_the_distribution_is_unchanged():
    """Of the fifth token over many seeds, whether a draft had it or not: chi-square of two samples."""
    count = 3000
    prompt = random.Random(1).choices(range(9), k=60)

    def fifth(engine: Engine, first_seed: int) -> np.ndarray:
        said = np.zeros(50)
        for start in range(0, count, 60):
            requests: list[AddRequest] = [
                request(str(seed), prompt, max_new_tokens=5, seed=first_seed + seed, logprobs=None)
                for seed in range(start, start + 60)
            ]
            for outputs in run(engine, *requests).values():
                said[tokens(outputs)[4]] += 1
        return said

    engine = speculating(num_blocks=400, seqs=3, budget=200)
    first, second = fifth(engine, 0), fifth(make_engine(habit=HABIT, num_blocks=400, budget=200), 10**6)
    often = first + second >= 10
    pooled = [np.append(each[often], each[~often].sum()) for each in (first, second)]
    chi_square = ((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[0] + pooled[1], 1)).sum()
    freedom = int(often.sum())
    print(counts(engine), f"chi-square {chi_square:.1f} at {freedom}")
    assert counts(engine)["accepted"] > 200
    assert counts(engine)["rejected"] > 200
    assert chi_square <= freedom + 3.3 * np.sqrt(2 * freedom) + 4
