"""The encoder's engine over a mock model: order of results, failures alone, aborts, short steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from treadle.models.encoder_config import EncoderConfig
from treadle_worker.batch_former import BatchFormer
from treadle_worker.encoder_engine import FIRST_TOKENS, MAX_STEP_S, EncoderEngine, Result, TextWork
from treadle_worker.engine_protocol import (
    AddRequest,
    AddTask,
    SamplingParams,
    StepOutputs,
    TaskInput,
    TaskOutput,
)

BROKEN = 99
"""A token whose text is computed to NaN."""
DIMENSIONS = 4


def config(head: str = "", num_labels: int = 0) -> EncoderConfig:
    return EncoderConfig(
        model_type="bert",
        head=head,  # type: ignore[arg-type]
        num_labels=num_labels,
        vocab_size=100,
        hidden_size=DIMENSIONS,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        activation="gelu",
    )


def vector(token_ids: Sequence[int]) -> Result:
    """What the mock model says of a text, whatever else is in the batch."""
    chances = random.Random(tuple(token_ids).__hash__())
    return np.array([chances.uniform(-1, 1) for _ in range(DIMENSIONS)], "<f4")


class MockRunner:
    """Says `vector`, and keeps what it was given."""

    def __init__(self, clock: Clock | None = None, token_s: float = 0.0) -> None:
        self.batches: list[list[TextWork]] = []
        self._clock, self._token_s = clock, token_s
        self.closed = False

    def run(self, works: Sequence[TextWork]) -> list[Result | None]:
        self.batches.append(list(works))
        if self._clock is not None:
            self._clock.now += self._token_s * sum(len(work.text.token_ids) for work in works)
        return [
            None
            if BROKEN in work.text.token_ids
            else vector(work.text.token_ids)[: work.task.dimensions or None]
            for work in works
        ]

    def close(self) -> None:
        self.closed = True


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def make_engine(
    runner: MockRunner | None = None,
    *,
    budget: int = 32,
    head: str = "",
    num_labels: int = 0,
    clock: Clock | None = None,
    max_shared_step_ms: float = 0.0,
) -> EncoderEngine:
    return EncoderEngine(
        runner or MockRunner(),
        BatchFormer(budget, quadratic_tokens=1e9),
        config(head, num_labels),
        max_model_len=50,
        max_num_seqs=8,
        max_shared_step_ms=max_shared_step_ms,
        clock=clock or Clock(),
    )


def task(request_id: str, texts: Sequence[Sequence[int]], **fields: object) -> AddTask:
    asked: dict[str, object] = {"task": "embed", "pooling": "mean"} | fields
    return AddTask(request_id=request_id, inputs=[TaskInput(token_ids=list(ids)) for ids in texts], **asked)


def texts(rng: random.Random, count: int, longest: int = 20) -> list[list[int]]:
    return [[rng.randrange(90) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def run(engine: EncoderEngine) -> dict[str, TaskOutput]:
    answers: dict[str, TaskOutput] = {}
    for _ in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step().task_outputs:
            assert output.request_id not in answers, "each task is answered once"
            answers[output.request_id] = output
    assert not engine.has_work
    return answers


def test_results_come_whole_and_in_the_order_of_the_inputs(rng):
    runner = MockRunner()
    engine = make_engine(runner)
    asked = {str(number): texts(rng, rng.randint(1, 40)) for number in range(50)}
    for request_id, inputs in asked.items():
        engine.add_task(task(request_id, inputs, priority=rng.randint(-1, 1)))
    answers = run(engine)
    for request_id, inputs in asked.items():
        got = np.frombuffer(answers[request_id].data, "<f4").reshape(len(inputs), DIMENSIONS)
        assert (got == np.stack([vector(ids) for ids in inputs])).all()
    together = sum(len(batch) > 1 for batch in runner.batches)
    mixed = sum(len({work.task.request_id for work in batch}) > 1 for batch in runner.batches)
    stats = engine.stats()
    print(f"{stats.num_task_inputs} texts in {stats.num_steps} steps, {mixed} with several tasks")
    assert together > 100
    assert mixed > 50
    assert stats.num_task_inputs == sum(len(inputs) for inputs in asked.values())
    assert stats.num_task_tokens == sum(len(ids) for inputs in asked.values() for ids in inputs)
    assert stats.num_running == stats.num_waiting == 0


def test_a_text_that_is_not_finite_fails_its_task_alone(rng):
    engine = make_engine()
    good = {str(number): texts(rng, 12) for number in range(6)}
    for request_id, inputs in good.items():
        engine.add_task(task(request_id, inputs))
    engine.add_task(task("bad", [*texts(rng, 5), [3, BROKEN, 4], *texts(rng, 5), [BROKEN]]))
    answers = run(engine)
    assert "not finite" in answers["bad"].error
    assert answers["bad"].error.startswith("inputs[")
    assert answers["bad"].data == b""
    for request_id, inputs in good.items():
        assert not answers[request_id].error
        assert answers[request_id].data == b"".join(vector(ids).tobytes() for ids in inputs)


def test_aborted_tasks_are_not_heard_of_again(rng):
    runner = MockRunner()
    engine = make_engine(runner)
    for number in range(40):
        engine.add_task(task(str(number), texts(rng, 10)))
    aborted, answers = set(), {}
    while engine.has_work:
        for output in engine.step().task_outputs:
            answers[output.request_id] = output
        victim = str(rng.randrange(40))
        if victim not in answers:
            engine.abort(victim)
            aborted.add(victim)
        before = len(runner.batches)
    assert before
    print(f"{len(aborted)} of 40 aborted")
    assert aborted
    assert answers.keys() == {str(number) for number in range(40)} - aborted
    engine.abort("never there")
    assert not engine.has_work
    assert engine.stats().num_commands > 40


def test_a_second_task_of_the_same_id_takes_the_place_of_the_first(rng):
    engine = make_engine()
    engine.add_task(task("one", texts(rng, 50)))
    engine.step()
    engine.add_task(task("one", [[1, 2]]))
    assert run(engine)["one"].data == vector([1, 2]).tobytes()


def test_higher_priorities_are_answered_first(rng):
    engine = make_engine()
    engine.add_task(task("low", texts(rng, 30), priority=-1))
    engine.step()
    engine.add_task(task("high", texts(rng, 30), priority=1))
    assert list(run(engine)) == ["high", "low"]


def test_documents_are_ranked_by_their_embeddings(rng):
    engine = make_engine()
    inputs = texts(rng, 30)
    engine.add_task(task("ranked", inputs, task="rank", normalize=True))
    got = np.frombuffer(run(engine)["ranked"].data, "<f4")
    query, *documents = [vector(ids).astype(np.float64) for ids in inputs]
    assert len(got) == 29
    assert got == pytest.approx([float(document @ query) for document in documents], abs=1e-6)


@pytest.mark.parametrize(
    ("engine", "command", "error"),
    [
        (make_engine(), task("x", [[1]], task="classify", pooling=""), "cannot classify; it can embed, rank"),
        (make_engine(head="token", num_labels=3), task("x", [[1]]), "cannot embed; it can tag"),
        (make_engine(head="sequence", num_labels=2), task("x", [[1]], task="rank"), "cannot rank"),
        (make_engine(head="sequence", num_labels=1), task("x", [[1], [2]], task="rank"), "by its head"),
        (make_engine(), task("x", [[1], [2]], task="rank", pooling=""), "by embeddings"),
        (make_engine(), task("x", [[1]], task="rank"), "inputs: 1"),
        (make_engine(), task("x", [[1]], pooling=""), "pooling"),
        (make_engine(), task("x", [[1]], dimensions=5), "dimensions"),
        (make_engine(), task("x", []), "inputs"),
        (make_engine(), task("x", [[1], []]), r"inputs\[1\]"),
        (make_engine(), task("x", [[1], [100]]), "vocabulary"),
        (make_engine(), task("x", [[1] * 51]), "51 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(engine, command, error):
    engine.add_task(task("good", [[1, 2]], task=engine.tasks[0]))
    engine.add_task(command)
    answers = run(engine)
    assert not answers["good"].error
    with pytest.raises(AssertionError, match=error):
        assert not answers["x"].error, answers["x"].error


@pytest.mark.parametrize("wrong", [{"type_ids": [0]}, {"type_ids": [0, 2]}, {"first": 2}])
def test_an_input_that_would_index_past_a_table_is_refused(wrong):
    engine = make_engine()
    bad = TaskInput(token_ids=[1, 2], **wrong)
    engine.add_task(AddTask(request_id="x", task="embed", inputs=[bad], pooling="mean"))
    assert run(engine)["x"].error.startswith("inputs[0]")


def test_it_does_not_generate():
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=3)
    engine.add_request(AddRequest(request_id="x", prompt_token_ids=[1], sampling=sampling))
    said = engine.report()
    assert [output.finish_reason for output in said.outputs] == ["error"]
    assert "does not generate; it can embed, rank" in said.outputs[0].error
    assert not engine.has_work


def test_a_task_is_admitted_once(rng):
    engine = make_engine()
    for number in range(5):
        engine.add_task(task(str(number), texts(rng, 20)))
    assert engine.report().admitted == []
    admitted: list[str] = []
    waiting = engine.stats().num_waiting
    while engine.has_work:
        said: StepOutputs = engine.step()
        admitted += said.admitted
        waiting = min(waiting, said.stats.num_waiting)
    assert sorted(admitted) == [str(number) for number in range(5)]
    assert waiting == 0


def test_steps_are_short_while_the_device_is_shared(rng):
    clock = Clock()
    runner = MockRunner(clock, token_s=0.0004)
    engine = make_engine(runner, budget=1_000, clock=clock, max_shared_step_ms=40.0)
    engine.add_task(task("long", texts(rng, 2_000)))

    def tokens() -> int:
        engine.step()
        return sum(len(work.text.token_ids) for work in runner.batches[-1])

    assert tokens() <= FIRST_TOKENS, "nobody knows yet what a token takes"
    assert tokens() > 900, "alone it takes its whole budget"
    engine.shares_device()
    shared = [tokens() for _ in range(5)]
    print(f"steps of {shared} tokens at 0.4 milliseconds each")
    assert all(50 < count <= 100 for count in shared)
    clock.now += 1.0
    assert tokens() > 900
    engine.shares_device()
    clock.now += 60.0
    engine.shares_device()
    assert tokens() <= 100, "given the turn after a long one of another's"


def test_the_very_first_step_is_short_where_the_device_is_shared(rng):
    clock = Clock()
    runner = MockRunner(clock, token_s=0.001)
    engine = make_engine(runner, budget=1_000, clock=clock, max_shared_step_ms=100.0)
    engine.add_task(task("long", texts(rng, 2_000)))
    engine.shares_device()
    began = clock.now
    for _ in range(3):
        engine.step()
    sizes = [sum(len(work.text.token_ids) for work in batch) for batch in runner.batches]
    print(f"the first steps took {sizes} tokens of 1000")
    assert 1 <= sizes[0] <= FIRST_TOKENS
    assert clock.now - began <= 0.3
    assert sizes[1] > 50


def test_no_step_of_a_slow_model_takes_long_on_a_device_of_its_own(rng):
    """A batch that would take ten seconds is several steps, and an abort is heard between them."""
    clock = Clock()
    runner = MockRunner(clock, token_s=0.01)
    engine = make_engine(runner, budget=1_000, clock=clock, max_shared_step_ms=0.0)
    engine.add_task(task("long", texts(rng, 200)))
    took = []
    while engine.has_work:
        began = clock.now
        engine.step()
        took.append(clock.now - began)
    print(f"{len(took)} steps of {min(took):.2f} to {max(took):.2f} s")
    assert len(took) > 10
    assert max(took[1:]) <= MAX_STEP_S * 1.01


def test_closing_gives_everything_back(rng):
    runner = MockRunner()
    engine = make_engine(runner)
    engine.add_task(task("one", texts(rng, 20)))
    engine.close()
    assert runner.closed
    assert not engine.has_work
    ready = engine.ready()
    assert (ready.generates, ready.num_blocks, ready.max_model_len) == (False, 0, 50)
