"""A request's tokens and log-probabilities have the same bits however the engine comes to them.

Batched = alone, chunked = whole, cached = fresh, preempted = undisturbed, speculated = plain, over the real
model runner; each test shows that what it is about took place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from profiles import BFLOAT16, FLOAT32, INT4, TORCH_BFLOAT16, Profile

from treadle_worker.block_manager import BlockManager
from treadle_worker.engine import Engine
from treadle_worker.engine_protocol import AddRequest, EngineStats, SamplingParams, TokenLogprobs
from treadle_worker.model_runner import ModelRunner
from treadle_worker.sampler import Sampler
from treadle_worker.scheduler import Scheduler
from treadle_worker.speculation import Speculation

BLOCK_SIZE = 16
MODELS = [
    *(("tiny", profile) for profile in (FLOAT32, BFLOAT16, INT4, TORCH_BFLOAT16)),
    ("smollm2", BFLOAT16),
]


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    num_cached_tokens: int


@dataclass(frozen=True)
class Model:
    """A loaded model, and how long its prompts and answers are here."""

    runner_model: torch.nn.Module
    profile: Profile
    vocab_size: int
    num_requests: int
    max_prompt: int
    max_new_tokens: int

    def engine(
        self,
        *,
        num_blocks: int = 128,
        max_num_seqs: int = 16,
        budget: int = 1024,
        caching: bool = False,
        speculation: Speculation | None = None,
    ) -> Engine:
        config = self.runner_model.config
        cache = self.profile.cache(config, num_blocks, BLOCK_SIZE)
        return Engine(
            ModelRunner(self.runner_model, cache),
            Scheduler(
                BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                speculation=speculation,
            ),
            Sampler(),
            vocab_size=config.vocab_size,
            max_model_len=512,
        )

    def requests(self, seed: int) -> list[AddRequest]:
        """Random lengths and parameters; some begin alike."""
        rng = random.Random(seed)
        shared = rng.choices(range(2, self.vocab_size), k=self.max_prompt)
        requests = []
        for index in range(self.num_requests):
            length = rng.randint(1, self.max_prompt)
            common = rng.choice([0, rng.randrange(length)])
            prompt = shared[:common] + rng.choices(range(2, self.vocab_size), k=length - common)
            sampling = SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.0]),
                top_k=rng.choice([0, 20]),
                top_p=rng.choice([1.0, 0.9]),
                seed=rng.getrandbits(64),
                repetition_penalty=rng.choice([1.0, 1.1]),
                frequency_penalty=rng.choice([0.0, 0.2]),
                max_new_tokens=rng.randint(self.max_new_tokens // 2, self.max_new_tokens),
                logprobs=rng.choice([0, 5]),
            )
            requests.append(AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        return requests


def run(
    engine: Engine, requests: list[AddRequest], late: list[AddRequest] | None = None
) -> dict[str, Answer]:
    """Every request's whole answer; a late one comes after each step that leaves two running."""
    for request in requests:
        engine.add_request(request)
    late = list(late or [])
    answers = {request.request_id: Answer([], [], 0) for request in [*requests, *late]}
    while engine.has_work or late:
        step = engine.step()
        for output in step.outputs:
            assert output.error == ""
            said = answers[output.request_id]
            answers[output.request_id] = Answer(
                said.token_ids + output.token_ids,
                said.logprobs + (output.logprobs or []),
                output.num_cached_tokens,
            )
        if late and (step.stats.num_running >= 2 or not engine.has_work):
            engine.add_request(late.pop(0))
    return answers


def check_equal(answers: dict[str, Answer], alone: dict[str, Answer]) -> None:
    """Tokens and log-probabilities, bit for bit."""
    assert answers.keys() == alone.keys()
    for request_id, answer in answers.items():
        assert answer.token_ids == alone[request_id].token_ids
        assert answer.logprobs == alone[request_id].logprobs


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: f"{param[0]}-{param[1].name}")
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """The tiny one on one thread, the real one on two, whose split of the work must not show either."""
    name, profile = request.param
    folder: Path = request.getfixturevalue(f"{'tiny_llama' if name == 'tiny' else name}_folder")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if name == "tiny" else 2)
    loaded = profile.load(folder)
    count, long, new = (12, 120, 40) if name == "tiny" else (6, 60, 10)
    yield Model(loaded, profile, loaded.config.vocab_size, count, long, new)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def requests(model: Model) -> list[AddRequest]:
    return model.requests(seed=2)


@pytest.fixture(scope="module")
def alone(model: Model, requests: list[AddRequest]) -> dict[str, Answer]:
    """Each request in an engine that has nothing else to do, its prompt in one piece."""
    return {r.request_id: run(model.engine(max_num_seqs=1), [r])[r.request_id] for r in requests}


def test_batched_is_alone(model, requests, alone):
    engine = model.engine()
    check_equal(run(engine, requests), alone)
    stats = engine.stats()
    steps_alone = sum(request.sampling.max_new_tokens for request in requests)
    print(f"{stats.num_steps} steps instead of {steps_alone}")
    assert stats.num_steps < steps_alone / 2
    assert len({tuple(answer.token_ids) for answer in alone.values()}) == len(requests)


def test_chunked_is_whole(model, requests, alone):
    engine = model.engine(budget=19)
    check_equal(run(engine, requests), alone)
    chunks = engine.stats().num_chunked_prefills
    print(f"{chunks} chunks that did not end their prompt")
    assert chunks > 3


def test_cached_is_fresh(model, requests, alone):
    engine = model.engine(caching=True, num_blocks=256)
    check_equal(run(engine, requests), alone)
    first = engine.stats().prefix_cache_hits
    again = run(engine, requests)
    check_equal(again, alone)
    hits = engine.stats().prefix_cache_hits - first
    print(f"{first} prompt tokens found among the requests, {hits} when they came again")
    assert hits > 0
    for request in requests:
        whole_blocks = (len(request.prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert again[request.request_id].num_cached_tokens == whole_blocks


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_is_undisturbed(model, requests, alone, caching):
    """A cache for two of the longest, three seats, and half of the requests urgent and late."""
    num_blocks = 2 * -(-(model.max_prompt + model.max_new_tokens) // BLOCK_SIZE)
    engine = model.engine(num_blocks=num_blocks, max_num_seqs=3, budget=32, caching=caching)
    urgent = [msgspec.structs.replace(request, priority=1) for request in requests[::2]]
    check_equal(run(engine, requests[1::2], urgent), alone)
    stats: EngineStats = engine.stats()
    print(f"{stats.num_preemptions} preemptions, {stats.num_chunked_prefills} chunks")
    assert stats.num_preemptions > 1
    assert stats.num_chunked_prefills > 0
    assert stats.num_free_blocks == num_blocks


def test_resumed_is_uninterrupted(model, requests, alone):
    """With the first tokens given as delivered, the rest is what it would have been."""
    resumed = []
    for request in requests:
        said = alone[request.request_id].token_ids
        resumed.append(
            AddRequest(
                request_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=said[: len(said) // 2],
                sampling=request.sampling,
            )
        )
    engine = model.engine()
    for request in resumed:
        engine.add_request(request)
    rest: dict[str, list[int]] = {request.request_id: [] for request in resumed}
    while engine.has_work:
        for output in engine.step().outputs:
            rest[output.request_id] += output.token_ids
    for request in resumed:
        assert request.output_token_ids + rest[request.request_id] == alone[request.request_id].token_ids
    print(f"{sum(len(request.output_token_ids) for request in resumed)} delivered tokens")
    assert all(rest.values())


def test_speculated_is_plain(model, requests):
    """Answers of a few tokens alone, which repeat themselves as much as they do not.

    Crowded, so that drafts of some stand beside prompts and preemptions of others.
    """
    repeating = [
        msgspec.structs.replace(
            request,
            prompt_token_ids=request.prompt_token_ids[:60],
            sampling=msgspec.structs.replace(
                request.sampling,
                logit_bias=dict.fromkeys(range(260, 270), 50.0),
                repetition_penalty=1.0,
                max_new_tokens=24,
            ),
        )
        for request in requests
    ]
    plain = {r.request_id: run(model.engine(max_num_seqs=1), [r])[r.request_id] for r in repeating}
    num_blocks = 3 * -(-(60 + 24) // BLOCK_SIZE)
    engine = model.engine(
        num_blocks=num_blocks,
        max_num_seqs=4,
        budget=48,
        caching=True,
        speculation=Speculation(num_speculative_tokens=4, max_rows=48, min_ngram=1),
    )
    urgent = [msgspec.structs.replace(request, priority=1) for request in repeating[::2]]
    check_equal(run(engine, repeating[1::2], urgent), plain)
    stats = engine.stats()
    rejected = stats.num_draft_tokens - stats.num_accepted_tokens
    print(
        f"{stats.num_accepted_tokens} draft tokens accepted, {rejected} rejected, "
        f"{stats.num_preemptions} preemptions, {stats.num_steps} steps for {stats.num_output_tokens} tokens"
    )
    assert stats.num_accepted_tokens > 0
    assert rejected > 0
    assert stats.num_preemptions > 0
    assert stats.num_free_blocks == num_blocks
