"""A text's scores have the same bits however the engine comes to them, and are those of transformers.

Batched = alone, chunked = whole, cached = fresh, preempted = undisturbed, and a generated answer's = those it
was given with; each test shows that what it is about took place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mock_engine import read_scores, run_tasks, score_task
from profiles import BFLOAT16, FLOAT32, INT4, TORCH_BFLOAT16, TORCH_FLOAT32, Profile
from tiny_models import KINDS, VOCABULARY, make

from treadle.nn.llama import LlamaForCausalLM
from treadle_worker.block_manager import BlockManager
from treadle_worker.engine import Engine
from treadle_worker.engine_protocol import AddRequest, AddTask, SamplingParams
from treadle_worker.model_runner import ModelRunner
from treadle_worker.sampler import Sampler
from treadle_worker.scheduler import Scheduler

BLOCK_SIZE = 16
LONGEST = 150
PROFILES = [FLOAT32, BFLOAT16, INT4, TORCH_BFLOAT16]


class Model:
    """A loaded model, and engines over it."""

    def __init__(self, folder: Path, profile: Profile) -> None:
        self.model: LlamaForCausalLM = profile.load(folder)
        self.profile = profile

    def engine(
        self,
        *,
        num_blocks: int = 128,
        max_num_seqs: int = 16,
        budget: int = 1024,
        caching: bool = False,
        max_score_rows: int = 512,
    ) -> Engine:
        cache = self.profile.cache(self.model.config, num_blocks, BLOCK_SIZE)
        return Engine(
            ModelRunner(self.model, cache),
            Scheduler(
                BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                max_score_rows=max_score_rows,
            ),
            Sampler(),
            vocab_size=self.model.config.vocab_size,
            max_model_len=512,
        )

    def alone(self, tasks: list[AddTask]) -> dict[str, bytes]:
        """Each in an engine of its own, its texts one after the other, whole."""
        return {
            task.request_id: b"".join(
                scores(self.engine(max_num_seqs=1), score_task("t", (one.token_ids, one.first)))["t"]
                for one in task.inputs
            )
            for task in tasks
        }


def scores(engine: Engine, *commands: AddTask | AddRequest) -> dict[str, bytes]:
    outputs = run_tasks(engine, *commands)
    assert all(output.error == "" for output in outputs.values())
    return {name: output.data for name, output in outputs.items()}


def some_tasks(rng: random.Random, vocab_size: int, count: int = 10) -> list[AddTask]:
    """Texts of random lengths; some begin alike."""
    shared = rng.choices(range(2, vocab_size), k=LONGEST)
    tasks = []
    for index in range(count):
        inputs = []
        for _ in range(rng.randint(1, 3)):
            length = rng.randint(2, LONGEST)
            common = rng.choice([0, rng.randrange(length)])
            token_ids = shared[:common] + rng.choices(range(2, vocab_size), k=length - common)
            inputs.append((token_ids, rng.randint(1, length - 1)))
        tasks.append(score_task(str(index), *inputs))
    return tasks


@pytest.fixture(scope="module", params=PROFILES, ids=lambda profile: profile.name)
def model(request: pytest.FixtureRequest, tiny_llama_folder: Path) -> Iterator[Model]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Model(tiny_llama_folder, request.param)
    torch.set_num_threads(threads)


@pytest.fixture
def tasks(model: Model, rng: random.Random) -> list[AddTask]:
    return some_tasks(rng, model.model.config.vocab_size)


def answers(rng: random.Random, count: int, **fields: object) -> list[AddRequest]:
    """Requests that generate beside the tasks."""
    return [
        AddRequest(
            request_id=f"r{index}",
            prompt_token_ids=rng.choices(range(2, 500), k=rng.randint(1, 100)),
            sampling=SamplingParams(temperature=1.0, seed=index, max_new_tokens=rng.randint(2, 30)),
            **fields,
        )
        for index in range(count)
    ]


def test_batched_beside_answers_is_alone(model, tasks, rng):
    engine = model.engine()
    assert scores(engine, *answers(rng, 5), *tasks) == model.alone(tasks)
    stats = engine.stats()
    print(f"{stats.num_task_inputs} texts and {stats.num_output_tokens} tokens in {stats.num_steps} steps")
    assert stats.num_task_inputs == sum(len(task.inputs) for task in tasks)
    assert stats.num_steps < stats.num_output_tokens


def test_chunked_is_whole(model, tasks):
    engine = model.engine(budget=37, max_score_rows=11)
    assert scores(engine, *tasks) == model.alone(tasks)
    chunks = engine.stats().num_chunked_prefills
    print(f"{chunks} chunks that did not end their text")
    assert chunks > 10


def test_cached_is_fresh(model, tasks):
    engine = model.engine(caching=True, num_blocks=512)
    alone = model.alone(tasks)
    assert scores(engine, *tasks) == alone
    first = engine.stats().prefix_cache_hits
    assert scores(engine, *tasks) == alone
    hits = engine.stats().prefix_cache_hits - first
    whole = sum((one.first - 1) // BLOCK_SIZE * BLOCK_SIZE for task in tasks for one in task.inputs)
    print(f"{first} tokens found among the texts, {hits} when they came again")
    assert hits == whole > 0


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_is_undisturbed(model, tasks, rng, caching):
    """A cache for little more than one of the longest, and an urgent answer whenever a text is half done."""
    alone = model.alone(tasks)
    num_blocks = LONGEST // BLOCK_SIZE + 4
    engine = model.engine(
        num_blocks=num_blocks, max_num_seqs=3, budget=32, caching=caching, max_score_rows=16
    )
    urgent, data, preempted = answers(rng, 8, priority=1), {}, 0
    # One that is sure to be in the way.
    long = score_task("long", (rng.choices(range(2, 500), k=LONGEST), 1))
    alone |= model.alone([long])
    for task in [long, *tasks]:
        engine.add_task(task)
    while engine.has_work:
        running = engine.scheduler.running()
        if urgent and any(one.scoring is not None and one.num_computed_tokens > 0 for one in running):
            engine.add_request(urgent.pop())
        step = engine.step()
        preempted += sum(name in alone for name in step.preempted)
        data |= {output.request_id: output.data for output in step.task_outputs}
    stats = engine.stats()
    print(f"{preempted} preemptions of texts, {stats.num_chunked_prefills} chunks")
    assert data == alone
    assert preempted > 0
    assert stats.num_chunked_prefills > 0
    assert stats.num_free_blocks == num_blocks


def test_an_answers_scores_are_the_log_probabilities_that_it_was_given_with(model, rng):
    requests = [
        AddRequest(
            request_id=str(index),
            prompt_token_ids=rng.choices(range(2, 500), k=rng.randint(1, 100)),
            sampling=SamplingParams(
                temperature=rng.choice([0.0, 1.0]), seed=index, max_new_tokens=40, logprobs=1
            ),
        )
        for index in range(6)
    ]
    engine = model.engine()
    for request in requests:
        engine.add_request(request)
    said: dict[str, list[tuple[int, int, float]]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step().outputs:
            said[output.request_id] += [
                (token, one.top[0][0], one.logprob)
                for token, one in zip(output.token_ids, output.logprobs, strict=True)
            ]
    compared = 0
    for request in requests:
        given = said[request.request_id]
        prompt = request.prompt_token_ids
        task = score_task("t", ([*prompt, *(token for token, _, _ in given)], len(prompt)))
        found = read_scores(scores(model.engine(), task)["t"])
        assert found == [(best, logprob) for _, best, logprob in given]
        compared += len(found)
    print(f"{compared} tokens compared")
    assert compared == 6 * 40


@pytest.mark.parametrize("profile", [FLOAT32, TORCH_FLOAT32], ids=lambda one: one.name)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_transformers_log_probabilities(kind, profile, tmp_path, rng):
    reference = make(kind, tmp_path, rng.randrange(1 << 31))
    tasks = some_tasks(rng, VOCABULARY, 8)
    engine = Model(tmp_path, profile).engine(budget=64, max_score_rows=40, caching=True)
    found = scores(engine, *tasks)
    worst, compared, greedy = 0.0, 0, 0
    for task in tasks:
        said = read_scores(found[task.request_id])
        for one in task.inputs:
            with torch.no_grad():
                logits = reference(torch.tensor([one.token_ids])).logits[0, one.first - 1 : -1].double()
            logprobs = torch.log_softmax(logits, dim=1)
            best = logprobs.topk(2).values
            for row, token in enumerate(one.token_ids[one.first :]):
                likeliest, logprob = said.pop(0)
                worst = max(worst, abs(logprob - logprobs[row, token].item()))
                compared += 1
                if best[row, 0] - best[row, 1] > 1e-3:
                    assert likeliest == logprobs[row].argmax()
                    greedy += 1
        assert not said
    chunks, hits = engine.stats().num_chunked_prefills, engine.stats().prefix_cache_hits
    print(f"{kind}: {compared} scores within {worst:.1e}, {greedy} likeliest; {chunks} chunks, {hits} found")
    assert worst < 1e-4
    assert min(greedy, chunks) > 0
