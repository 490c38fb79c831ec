"""Score tasks over a mock model: what they say, who they run beside, and how they end."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
from mock_engine import (
    BROKEN,
    VOCAB,
    MockRunner,
    make_engine,
    read_scores,
    request,
    run,
    run_tasks,
    score_task,
    tokens,
)

from treadle_worker.batch import ScheduledChunk
from treadle_worker.engine_protocol import AddRequest, AddTask, TaskInput
from treadle_worker.scoring import LOGITS_BYTES, max_score_rows
from treadle_worker.speculation import Speculation


def expected(token_ids: list[int], first: int) -> list[tuple[int, float]]:
    """From the model's rows over the whole text, in float64."""
    runner = MockRunner(1, len(token_ids))
    rows = runner.run([ScheduledChunk(token_ids[:-1], 0, [0], len(token_ids) - first)])
    logprobs = torch.log_softmax(rows.double(), dim=1)
    wanted = token_ids[first:]
    return [(row.argmax().item(), row[token].item()) for row, token in zip(logprobs, wanted, strict=True)]


def text(rng: random.Random, longest: int = 60) -> tuple[list[int], int]:
    """Tokens, some of which others begin with, too, and where what is scored begins."""
    shared = [1, 2, 3, 4] * rng.randint(0, 6)
    token_ids = shared + rng.choices(range(40), k=rng.randint(2, longest - 24))
    return token_ids, rng.randint(1, len(token_ids) - 1)


def test_scores_are_the_models_log_probabilities_in_the_order_of_the_inputs(rng):
    inputs = [text(rng) for _ in range(9)]
    output = run_tasks(make_engine(), score_task("t", *inputs))["t"]
    said = read_scores(output.data)
    wanted = [score for one in inputs for score in expected(*one)]
    worst = max(abs(a[1] - b[1]) for a, b in zip(said, wanted, strict=True))
    print(f"{len(said)} scores, of which the worst is off by {worst:.1e}")
    assert [token for token, _ in said] == [token for token, _ in wanted]
    assert worst < 1e-5
    assert output.error == ""


def test_a_generated_answer_has_the_log_probabilities_that_it_was_given_with():
    engine = make_engine()
    outputs = run(engine, request("r", [1, 2, 3], max_new_tokens=30, temperature=1.0, seed=4))["r"]
    answer = tokens(outputs)
    given = [one.logprob for output in outputs for one in output.logprobs]
    said = read_scores(run_tasks(engine, score_task("t", ([1, 2, 3, *answer], 3)))["t"].data)
    assert [logprob for _, logprob in said] == given
    assert len(given) == 30


def crowd(rng: random.Random) -> tuple[list[AddTask], list[AddRequest]]:
    tasks = [
        score_task(
            f"t{index}",
            # Some are long enough to be there for many steps.
            *(text(rng) for _ in range(rng.randint(1, 4))),
            *[([index % 40] * 70, 1)] * (index % 4 == 0),
            priority=rng.choice([-1, -1, 0, 1]),
            cache_salt=rng.choice(["", "a"]),
        )
        for index in range(40)
    ]
    requests = [
        request(
            f"r{index}",
            text(rng)[0],
            max_new_tokens=rng.randint(1, 25),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.getrandbits(64),
            priority=rng.choice([0, 0, 1]),
        )
        for index in range(30)
    ]
    requests += [request(f"urgent{index}", [index] * 40, priority=2) for index in range(5)]
    return tasks, requests


@pytest.mark.parametrize("caching", [True, False])
def test_crowded_is_alone(caching, rng):
    """Beside answers, in a small cache, cut by budget and rows, preempted: the same bits as alone.

    And no row of logits is computed twice, whatever is preempted.
    """
    tasks, requests = crowd(rng)
    alone = {task.request_id: run_tasks(make_engine(), task)[task.request_id] for task in tasks}
    answers = {one.request_id: tokens(run(make_engine(), one)[one.request_id]) for one in requests}
    engine = make_engine(num_blocks=22, caching=caching, max_score_rows=6)
    said: dict[str, list[int]] = {one.request_id: [] for one in requests}
    coming, urgent = [*tasks, *requests[:-5]], requests[-5:]
    rng.shuffle(coming)
    outputs, preempted, admitted = {}, [], []
    while coming or engine.has_work:
        for command in (coming.pop() for _ in range(min(len(coming), rng.randint(0, 2)))):
            (engine.add_task if isinstance(command, AddTask) else engine.add_request)(command)
        running = engine.scheduler.running()
        if urgent and any(one.scoring is not None and one.num_uncomputed_tokens > 30 for one in running):
            engine.add_request(urgent.pop())
        step = engine.step()
        outputs |= {output.request_id: output for output in step.task_outputs}
        preempted += [name for name in step.preempted if name in alone]
        admitted += [name for name in step.admitted if name in alone]
        for output in step.outputs:
            said[output.request_id] += output.token_ids
    assert outputs == alone
    assert said == answers
    assert sorted(admitted) == sorted(alone), "each task is admitted once"
    stats = engine.stats()
    scored = sum(len(one.token_ids) - one.first for task in tasks for one in task.inputs)
    drawn = sum(len(ids) for ids in answers.values())
    print(
        f"{len(preempted)} preemptions of scored texts, {stats.num_chunked_prefills} chunks, "
        f"{stats.prefix_cache_hits} prompt tokens found, {scored} rows scored"
    )
    assert preempted
    assert not urgent
    assert stats.num_chunked_prefills > 0
    assert (stats.prefix_cache_hits > 0) == caching
    assert sum(engine.runner.num_rows) == scored + drawn
    assert max(engine.runner.num_rows) <= 6 + 8
    assert stats.num_task_inputs == sum(len(task.inputs) for task in tasks)
    assert stats.num_task_tokens == sum(len(one.token_ids) for task in tasks for one in task.inputs)
    assert stats.num_free_blocks == 22


def test_a_prefix_is_taken_as_far_as_no_row_of_it_is_needed():
    engine = make_engine(budget=64)
    whole = list(range(40))
    hits = []
    for first in (39, 39, 17, 16, 1):
        before = engine.stats().prefix_cache_hits
        output = run_tasks(engine, score_task("t", (whole, first)))["t"]
        fresh = run_tasks(make_engine(caching=False), score_task("t", (whole, first)))["t"]
        assert output == fresh
        hits.append(engine.stats().prefix_cache_hits - before)
    print("tokens found:", hits)
    assert hits == [0, 36, 16, 12, 0]


def test_answers_and_scores_share_prefixes_of_one_salt_alone():
    engine = make_engine()
    prompt = list(range(20))
    run_tasks(engine, score_task("t", ([*prompt, 1], 20), cache_salt="a"))
    assert run(engine, request("r", prompt, cache_salt="a"))["r"][0].num_cached_tokens == 16
    assert run(engine, request("r", prompt, cache_salt="b"))["r"][0].num_cached_tokens == 0
    before = engine.stats().prefix_cache_hits
    run_tasks(engine, score_task("t", ([*prompt, 1], 20), cache_salt="c"))
    assert engine.stats().prefix_cache_hits == before


def test_logits_that_are_not_finite_fail_their_task_alone_and_are_never_shared():
    good = score_task("good", ([7] * 9, 2))
    alone = run_tasks(make_engine(), good)["good"]
    bad = score_task("bad", ([7] * 9, 3), ([7, 7, BROKEN] + [7] * 8, 1), ([5] * 40, 1))
    engine = make_engine(max_score_rows=8)
    answer = request("r", [7] * 9)
    outputs = run_tasks(engine, bad, good, answer)
    assert outputs["bad"].data == b""
    assert "finite" in outputs["bad"].error
    assert outputs["good"] == alone
    again = run_tasks(engine, bad, good)
    assert again == outputs
    poisoned = run(engine, request("p", [7, 7, BROKEN] + [7] * 8))["p"]
    assert poisoned[-1].num_cached_tokens == 0
    assert poisoned[-1].finish_reason == "error"


BAD = {
    "no inputs": AddTask(request_id="t", task="score", inputs=[]),
    "empty": score_task("t", ([], 1)),
    "one token": score_task("t", ([1], 1)),
    "outside": score_task("t", ([1, 2], 1), ([1, VOCAB], 1)),
    "negative": score_task("t", ([1, -1], 1)),
    "long": score_task("t", ([1] * 101, 1)),
    "nothing scored": score_task("t", ([1, 2], 2)),
    "no row before it": score_task("t", ([1, 2], 0)),
    "type ids": AddTask(
        request_id="t", task="score", inputs=[TaskInput(token_ids=[1, 2], type_ids=[0], first=1)]
    ),
    "another task": AddTask(
        request_id="t", task="embed", pooling="mean", inputs=[TaskInput(token_ids=[1, 2])]
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_task_fails_alone(bad):
    good = score_task("good", ([1, 2, 3], 1))
    alone = run_tasks(make_engine(), good)
    outputs = run_tasks(make_engine(), bad, good)
    assert outputs.pop("t").error
    assert outputs == alone


def test_a_text_as_long_as_the_context_is_scored():
    engine = make_engine(num_blocks=4, budget=8)
    assert engine.max_model_len == 17
    output = run_tasks(engine, score_task("t", ([3] * 17, 1)))["t"]
    assert len(read_scores(output.data)) == 16


def test_abort_frees_a_task_wherever_it_is_and_says_nothing():
    engine = make_engine(seqs=2, budget=8)
    long, short = ([1] * 30, 1), ([2] * 3, 1)
    for name in ("half", "waits", "whole"):
        engine.add_task(score_task(name, short, long))
    engine.add_task(score_task("refused", ([], 0)))
    engine.abort("refused")
    steps = [engine.step() for _ in range(2)]
    assert steps[0].admitted == ["half"]
    assert (engine.stats().num_running, engine.stats().num_task_inputs) == (1, 1)
    for name in ("half", "waits", "nobody"):
        engine.abort(name)
    assert engine.stats().num_running == 0
    ended = [output.request_id for _ in range(20) for output in engine.step().task_outputs]
    assert ended == ["whole"]
    assert not engine.has_work
    assert engine.stats().num_free_blocks == 32


def test_the_newer_of_a_name_replaces_the_older():
    alone = run_tasks(make_engine(), score_task("t", ([8] * 5, 1)))
    engine = make_engine(budget=8)
    engine.add_task(score_task("t", ([1] * 30, 1)))
    engine.step()
    assert run_tasks(engine, score_task("t", ([8] * 5, 1))) == alone
    engine.add_request(request("t", [1] * 3))
    assert run_tasks(engine, score_task("t", ([8] * 5, 1))) == alone
    engine.add_task(score_task("t", ([1] * 30, 1)))
    assert len(tokens(run(engine, request("t", [1] * 3))["t"])) == 8


def test_a_closed_engine_holds_no_task():
    engine = make_engine(budget=8)
    engine.add_task(score_task("t", ([1] * 30, 1)))
    engine.step()
    engine.close()
    assert not engine.has_work
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_an_urgent_task_goes_before_what_waits():
    engine = make_engine(budget=8)
    engine.add_task(score_task("low", *[([1] * 30, 1)] * 4, priority=-1))
    engine.step()
    engine.add_task(score_task("high", ([2] * 20, 1), priority=1))
    ended = [output.request_id for _ in range(40) for output in engine.step().task_outputs]
    assert ended == ["high", "low"]


def test_a_task_of_many_texts_does_not_stop_what_comes_behind_it():
    """An answer and a task wait for the texts that fill a step, not for all 200."""
    engine = make_engine(num_blocks=200)
    engine.add_task(score_task("long", *[([index % 40] * 20, 10) for index in range(200)]))
    engine.step()
    engine.add_request(request("r", [1, 2, 3], max_new_tokens=1))
    engine.add_task(score_task("short", ([5] * 4, 1)))
    ended: dict[str, int] = {}
    for step in range(1000):
        said = engine.step()
        ended |= dict.fromkeys([one.request_id for one in [*said.outputs, *said.task_outputs]], step)
        if not engine.has_work:
            break
    print("ended in steps", ended)
    assert max(ended["r"], ended["short"]) <= 3
    assert ended["long"] > 200


@pytest.mark.parametrize("vocab", [97, 49_152, 151_936])
def test_rows_of_a_step_are_bounded_by_their_bytes(vocab):
    rows = max_score_rows(vocab)
    print(f"{vocab} tokens: {rows} rows, {rows * vocab * 4 >> 20} MiB")
    assert rows * vocab * 4 <= LOGITS_BYTES < 2 * rows * vocab * 4


def test_a_runner_that_gives_too_few_rows_is_not_hidden():
    engine = make_engine()
    engine.add_task(score_task("t", ([1] * 5, 1)))
    engine.runner.run = lambda chunks: torch.zeros(3, VOCAB)
    with pytest.raises(RuntimeError, match="3 rows of logits where 4 are scored"):
        engine.step()


def test_speculation_beside_scores_changes_neither(rng):
    tasks, _ = crowd(rng)
    requests = [request(f"r{index}", [1, 2, 3] * 5, max_new_tokens=30, seed=index) for index in range(4)]
    alone = {task.request_id: run_tasks(make_engine(), task)[task.request_id] for task in tasks}
    engine = make_engine(habit=0.9, speculation=Speculation(num_speculative_tokens=4, min_ngram=1))
    plain = [msgspec.structs.replace(task, cache_salt="") for task in tasks]
    outputs = run_tasks(engine, *requests, *plain)
    stats = engine.stats()
    print(f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} guessed tokens accepted")
    assert stats.num_draft_tokens > 0
    habit = {task.request_id: run_tasks(make_engine(habit=0.9), task)[task.request_id] for task in plain}
    assert outputs == habit
    assert outputs != alone
