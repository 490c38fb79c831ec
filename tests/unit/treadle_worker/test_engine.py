"""The engine over a mock model: how requests end, resume, fail alone, and what it counts."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
from mock_engine import BROKEN, VOCAB, make_engine, request, run, tokens


def test_length_and_context_end_a_request():
    outputs = run(
        make_engine(max_model_len=20),
        request("length", [1, 2, 3], max_new_tokens=5),
        request("context", [1] * 16, max_new_tokens=50),
    )
    assert [len(tokens(said)) for said in outputs.values()] == [5, 4]
    assert {said[-1].finish_reason for said in outputs.values()} == {"length"}
    assert all(len(o.logprobs[0].top) == 2 for said in outputs.values() for o in said)


def test_the_cache_bounds_the_context():
    engine = make_engine(num_blocks=4, max_model_len=100)
    assert engine.max_model_len == 17
    assert len(tokens(run(engine, request("r", [1] * 10, max_new_tokens=50))["r"])) == 7


def test_a_stop_token_ends_a_request_and_waits_for_the_minimum():
    free = tokens(run(make_engine(), request("r", [1, 2], max_new_tokens=12))["r"])
    stop = free[4]
    first = free.index(stop)
    last = run(make_engine(), request("r", [1, 2], max_new_tokens=12, stop_token_ids=(stop,)))["r"]
    assert tokens(last) == free[: first + 1], "the stop token is part of the output"
    assert (last[-1].finish_reason, last[-1].stop_token_id) == ("stop_token", stop)
    later = run(
        make_engine(), request("r", [1, 2], max_new_tokens=12, stop_token_ids=(stop,), min_new_tokens=9)
    )["r"]
    assert stop not in tokens(later)[:9]
    assert len(tokens(later)) >= 9


PENALISED = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1, "seed": 5}


@pytest.mark.parametrize("delivered", [1, 5, 9])
@pytest.mark.parametrize("fields", [{}, PENALISED], ids=["plain", "penalised"])
def test_resumed_is_uninterrupted(delivered, fields):
    whole = run(make_engine(), request("r", [4, 5, 6], max_new_tokens=10, **fields))["r"]
    rest = run(
        make_engine(),
        request("r", [4, 5, 6], output=tokens(whole)[:delivered], max_new_tokens=10, **fields),
    )["r"]
    assert tokens(rest) == tokens(whole)[delivered:]
    assert [o.logprobs for o in rest] == [o.logprobs for o in whole][delivered:]
    assert rest[0].first_index == delivered


@pytest.mark.parametrize(
    ("output", "fields", "reason", "stop"),
    [
        ([1, 2, 3], {"max_new_tokens": 3}, "length", None),
        ([1, 2], {"stop_token_ids": (2,)}, "stop_token", 2),
        ([], {"max_new_tokens": 0}, "length", None),
        ([1] * 95, {"max_new_tokens": 200}, "length", None),
    ],
)
def test_what_needs_no_token_ends_at_once(output, fields, reason, stop):
    engine = make_engine()
    (only,) = run(engine, request("r", [9] * 5, output=output, **fields))["r"]
    assert (only.token_ids, only.finish_reason, only.stop_token_id) == ([], reason, stop)
    assert engine.runner.num_chunks == 0


BAD = [
    {"prompt": []},
    {"prompt": [1, VOCAB]},
    {"prompt": [-1]},
    {"prompt": [1] * 100},
    {"output": [VOCAB]},
    {"output": [1] * 99},
    {"stop_token_ids": (VOCAB,)},
    {"logit_bias": {-1: 0.0}},
    {"logit_bias": {1: float("nan")}},
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 1.5},
    {"min_p": float("inf")},
    {"repetition_penalty": 0.0},
    {"presence_penalty": float("inf")},
    {"frequency_penalty": float("nan")},
    {"logprobs": -1},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_request_fails_alone(bad):
    good = request("good", [1, 2, 3])
    alone = run(make_engine(), good)["good"]
    fields = {"prompt": [1, 2], "max_new_tokens": 200} | bad
    outputs = run(make_engine(), request("bad", fields.pop("prompt"), **fields), good)
    (failure,) = outputs["bad"]
    assert failure.finish_reason == "error"
    assert failure.error
    assert outputs["good"] == alone


def test_broken_logits_fail_alone_and_are_never_shared():
    engine = make_engine()
    good = request("good", [7] * 9)
    alone = run(make_engine(), good)["good"]
    poisoned = [BROKEN] + [7] * 8
    outputs = run(engine, request("bad", poisoned), good)
    assert outputs["good"] == alone
    assert (outputs["bad"][-1].finish_reason, tokens(outputs["bad"])) == ("error", [])
    again = run(engine, request("bad", poisoned), good)
    assert again["bad"][-1].num_cached_tokens == 0
    assert tokens(again["good"]) == tokens(alone)
    assert again["good"][-1].num_cached_tokens == 8
    assert engine.scheduler.prefix_cache_hits == 8


def test_a_prefix_is_found_by_its_own_salt_alone():
    engine = make_engine()
    prompt = list(range(20))
    fresh = run(engine, request("r", prompt, cache_salt="a"))["r"]
    hit = run(engine, request("r", prompt, cache_salt="a"))["r"]
    assert (fresh[0].num_cached_tokens, hit[0].num_cached_tokens) == (0, 16)
    assert [(o.token_ids, o.logprobs) for o in hit] == [(o.token_ids, o.logprobs) for o in fresh]
    assert run(engine, request("r", prompt, cache_salt="b"))["r"][0].num_cached_tokens == 0


def test_abort_frees_its_blocks_and_says_nothing():
    engine = make_engine(seqs=2)
    for name in ("running", "other", "waiting"):
        engine.add_request(request(name, [1, 2, 3]))
    engine.add_request(request("refused", []))
    engine.abort("refused")
    assert {o.request_id for o in engine.step().outputs} == {"running", "other"}
    assert (engine.stats().num_running, engine.stats().num_waiting) == (2, 1)
    for name in ("running", "waiting", "nobody"):
        engine.abort(name)
    stats = engine.step().stats
    assert (stats.num_running, stats.num_waiting) == (1, 0)
    engine.abort("other")
    assert not engine.has_work
    assert engine.step().stats.num_free_blocks == 32


def test_the_newer_request_of_a_name_replaces_the_older():
    engine = make_engine()
    engine.add_request(request("r", [1, 2, 3]))
    engine.step()
    alone = run(make_engine(), request("r", [8, 8]))["r"]
    assert run(engine, request("r", [8, 8]))["r"] == alone


def test_a_failing_runner_is_not_hidden():
    engine = make_engine()
    engine.add_request(request("r", [1]))
    engine.runner.run = lambda chunks: torch.zeros(0, VOCAB)
    with pytest.raises(RuntimeError, match="rows of logits"):
        engine.step()


@pytest.mark.parametrize("caching", [True, False])
def test_crowded_is_alone(caching):
    """Random parameters, a cache too small for all, mixed priorities: everybody gets what they get alone."""
    rng = random.Random(3)
    requests = [
        request(
            str(index),
            [1, 2, 3, 4] * rng.randint(0, 4) + rng.choices(range(40), k=rng.randint(1, 20)),
            max_new_tokens=rng.randint(1, 25),
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.8]),
            seed=rng.getrandbits(64),
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 1.0]),
            priority=rng.choice([0, 0, 1]),
            stop_token_ids=(5,),
        )
        for index in range(60)
    ]
    engine = make_engine(num_blocks=20, caching=caching)
    crowded = run(engine, *requests)
    for each in requests:
        alone = run(make_engine(caching=False), each)[each.request_id]
        assert [msgspec.structs.replace(o, num_cached_tokens=0) for o in crowded[each.request_id]] == alone
    stats = engine.stats()
    print(stats)
    assert stats.num_preemptions > 0
    assert stats.num_chunked_prefills > 0
    assert (stats.prefix_cache_hits > 0) == caching
    assert stats.num_output_tokens == sum(len(tokens(said)) for said in crowded.values())
    assert stats.num_prompt_tokens == sum(len(each.prompt_token_ids) for each in requests)


def test_urgent_requests_overtake_and_the_others_make_room_for_them():
    """Three priorities come in the worst order: who waits, who is preempted, and in which order they end."""
    engine = make_engine(num_blocks=12, seqs=3)
    priority: dict[str, int] = {}
    ended: list[str] = []
    preempted: list[str] = []
    overtaken = 0
    first_token: dict[str, int] = {}

    def add(name: str, rank: int) -> None:
        priority[name] = rank
        engine.add_request(request(name, [len(priority)] * 8, max_new_tokens=8, priority=rank))

    for index in range(4):
        add(f"low{index}", 0)
    for step in range(200):
        if step == 2:
            for index in range(3):
                add(f"middle{index}", 1)
        if step == 4:
            for index in range(3):
                add(f"high{index}", 2)
        running = {sequence.request_id for sequence in engine.scheduler.running()}
        done = engine.step()
        for name in done.preempted:
            preempted.append(name)
            assert priority[name] == min(priority[other] for other in running), "a better one was preempted"
        for output in done.outputs:
            first_token.setdefault(output.request_id, step)
            if output.finish_reason:
                ended.append(output.request_id)
        overtaken += sum(priority[name] > 0 for name in done.admitted)
        if not engine.has_work:
            break
    counts = {rank: sum(priority[name] == rank for name in preempted) for rank in (0, 1, 2)}
    print(f"ended: {ended}; preempted by priority: {counts}; {overtaken} overtook")
    assert sorted(ended) == sorted(priority)
    assert [priority[name] for name in ended] == sorted(priority.values(), reverse=True)
    for rank in (0, 1, 2):
        peers = [name for name in ended if priority[name] == rank]
        assert peers == sorted(peers), "within a priority nobody is overtaken"
    assert counts[0] > 0
    assert counts[1] > 0
    assert counts[2] == 0
    assert first_token["low3"] > max(first_token[f"high{index}"] for index in range(3))
