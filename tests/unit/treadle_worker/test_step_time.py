"""What a step takes, learned on machines whose costs are known; and the gap that prompts leave to others."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace

import pytest
import torch
from mock_engine import VOCAB, MockRunner, request

from treadle_worker.batch import ScheduledChunk
from treadle_worker.block_manager import BlockManager
from treadle_worker.engine import Engine
from treadle_worker.sampler import Sampler
from treadle_worker.scheduler import Scheduler
from treadle_worker.step_time import MIN_CHUNK, StepTime, num_keys


@dataclass
class Machine:
    """Milliseconds."""

    base: float = 20.0
    per_row: float = 0.5
    per_key: float = 0.0005
    noise: float = 0.1
    """Share of a step."""

    def took(self, num_tokens: int, keys: int, rng: random.Random) -> float:
        exact = self.base + self.per_row * num_tokens + self.per_key * keys
        return exact * (1 + self.noise * (2 * rng.random() - 1))


def taught(machine: Machine, *, steps: int = 60, seed: int = 0) -> StepTime:
    """Has seen decodes, and prompts of up to 2,000 tokens in chunks."""
    rng, estimate = random.Random(seed), StepTime()
    for _ in range(steps):
        estimate.observe(0, 0, machine.took(0, 0, rng))
        num_tokens, start = rng.choice([256, 100, 40]), rng.randrange(2000)
        keys = num_keys(start, num_tokens)
        estimate.observe(num_tokens, keys, machine.took(num_tokens, keys, rng))
    return estimate


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "machine",
    [
        Machine(),
        Machine(base=5, per_row=2.0, per_key=0.0),
        Machine(per_row=0.3, per_key=0.002),
        Machine(noise=0),
    ],
    ids=str,
)
def test_the_estimate_is_near(machine, seed):
    estimate, rng = taught(machine, seed=seed), random.Random(seed)
    exact, worst = replace(machine, noise=0.0), 0.0
    for num_tokens, start in ((256, 0), (256, 1000), (64, 500), (128, 1900), (16, 0)):
        keys = num_keys(start, num_tokens)
        real = exact.took(num_tokens, keys, rng)
        worst = max(worst, abs(estimate.expected(num_tokens, keys) / real - 1))
    print(f"{estimate.base:.1f}, {estimate.per_token:.3f} a token, {estimate.per_key:.5f} a key: {worst:.0%}")
    assert worst < 0.25
    assert min(estimate.base, estimate.per_token, estimate.per_key) >= 0


@pytest.mark.parametrize("seed", range(20))
def test_it_rises_with_the_work_whatever_was_seen(seed):
    rng, estimate = random.Random(seed), StepTime()
    for _ in range(100):
        num_tokens = rng.choice([0, 1, 3, 16, 200])
        keys = num_keys(rng.randrange(3000), num_tokens)
        estimate.observe(num_tokens, keys, rng.choice([0.1, 5.0, 300.0, rng.uniform(0, 50)]))
        assert min(estimate.base, estimate.per_token, estimate.per_key) >= 0
        budget, start = rng.uniform(0, 400), rng.randrange(4000)
        fits = estimate.num_tokens_within(budget, start)
        if estimate.knows_prompts and fits < 1 << 30:
            assert estimate.expected(fits, num_keys(start, fits)) <= estimate.base + budget * (1 + 1e-9)
            more = estimate.expected(fits + 1, num_keys(start, fits + 1))
            assert more >= (estimate.base + budget) * (1 - 1e-9)
        assert fits >= estimate.num_tokens_within(budget, start + 100)


def test_one_pause_is_not_believed_and_a_slower_machine_is():
    estimate = taught(Machine(noise=0))
    before = estimate.expected(256, num_keys(0, 256))
    estimate.observe(256, num_keys(0, 256), 5000.0)
    estimate.observe(0, 0, 5000.0)
    after = estimate.expected(256, num_keys(0, 256))
    print(f"{before:.0f} ms, after a pause of 5 s {after:.0f}")
    assert before < after < before * 1.5
    slow, rng, steps = Machine(base=80, per_row=3.0, per_key=0.003, noise=0.05), random.Random(1), 0
    while abs(estimate.expected(256, num_keys(0, 256)) / slow.took(256, num_keys(0, 256), rng) - 1) > 0.2:
        estimate.observe(0, 0, slow.took(0, 0, rng))
        estimate.observe(128, num_keys(0, 128), slow.took(128, num_keys(0, 128), rng))
        steps += 1
    print(f"{steps} steps until a machine six times as slow is known")
    assert steps < 40


class TimedRunner(MockRunner):
    """A model that takes the machine's time, by a clock of its own."""

    def __init__(self, num_blocks: int, machine: Machine) -> None:
        super().__init__(num_blocks, 16)
        self.machine, self.rng, self.now = machine, random.Random(0), 0.0
        self.chunks: list[list[ScheduledChunk]] = []

    def run(self, chunks: ListOf[ScheduledChunk]) -> torch.Tensor:
        self.chunks.append(list(chunks))
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        keys = sum(num_keys(chunk.start, len(chunk.token_ids)) for chunk in chunks)
        self.now += self.machine.took(num_tokens, keys, self.rng) / 1000
        return super().run(chunks)


def timed(machine: Machine, max_inter_token_ms: float, *, budget: int = 1024) -> tuple[Engine, TimedRunner]:
    runner = TimedRunner(1000, machine)
    scheduler = Scheduler(
        BlockManager(1000, 16),
        max_num_seqs=16,
        max_num_batched_tokens=budget,
        max_inter_token_ms=max_inter_token_ms,
    )
    engine = Engine(
        runner, scheduler, Sampler(), vocab_size=VOCAB, max_model_len=8000, clock=lambda: runner.now
    )
    return engine, runner


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB - 1), k=length)


@pytest.mark.parametrize("bound", [60.0, 200.0])
def test_prompts_leave_the_gap_of_others_bounded(bound):
    """Answers run while prompts of 1,500 tokens arrive; each of their gaps is one step."""
    engine, runner = timed(Machine(), bound)
    for index in range(4):
        engine.add_request(request(f"running{index}", prompt(30, index), max_new_tokens=4000))
    for _ in range(5):
        engine.step()
    gaps, chunks, arrived = [], [], 0
    for step in range(400):
        if step % 80 == 0:
            engine.add_request(request(f"long{step}", prompt(1500, step), max_new_tokens=1))
            arrived += 1
        began = runner.now
        done = engine.step()
        gaps.append((runner.now - began) * 1000)
        assert sum(output.request_id.startswith("running") for output in done.outputs) == 4
        chunks += [(c.start, len(c.token_ids)) for c in runner.chunks[-1] if len(c.token_ids) > 1]
    gaps.sort()
    print(
        f"{arrived} prompts in {len(chunks)} chunks of {min(n for _, n in chunks)} to "
        f"{max(n for _, n in chunks)} tokens; gaps: median {gaps[200]:.0f} ms, longest {gaps[-1]:.0f} ms"
    )
    assert gaps[-1] < bound * 1.3
    assert gaps[int(len(gaps) * 0.9)] < bound * 1.15
    assert engine.stats().num_waiting == 0
    first = [n for start, n in chunks if start == 0 and n < 1024]
    last = [n for start, n in chunks if start > 1200]
    assert max(last[:-1], default=0) < max(first), "chunks shrink as the context grows"


def test_alone_a_prompt_has_the_whole_budget():
    engine, runner = timed(Machine(), 50.0)
    engine.add_request(request("first", prompt(2100, 0), max_new_tokens=2))
    for _ in range(3):
        engine.step()
    engine.add_request(request("second", prompt(2000, 1), max_new_tokens=2))
    engine.step()
    sizes = [[len(chunk.token_ids) for chunk in chunks] for chunks in runner.chunks]
    print(sizes)
    assert sizes[:3] == [[1024], [1024], [52]]
    assert sizes[3][0] == 1
    assert MIN_CHUNK <= sizes[3][1] < 100


def test_alone_on_a_shared_device_a_prompt_is_computed_in_short_steps():
    """Another engine waits for their end; and it gets as long a turn after it, for which the first token's
    successor waits."""
    engine, runner = timed(Machine(), 50.0)
    engine.shares_device()
    engine.add_request(request("first", prompt(2100, 0), max_new_tokens=1))
    took = []
    while engine.has_work:
        began = runner.now
        engine.step()
        engine.shares_device()
        took.append((runner.now - began) * 1000)
    print(f"{len(took)} steps of {min(took):.0f} to {max(took):.0f} ms")
    assert len(took) > 10
    assert sorted(took)[int(len(took) * 0.9)] < 50.0 * 1.15
    assert max(took) < 50.0 * 1.5


def test_prompts_never_starve():
    """A bound that decodes alone exceed: each step still takes a chunk of a prompt, the best one's."""
    engine, runner = timed(Machine(base=90), 50.0)
    engine.add_request(request("running", prompt(10, 0), max_new_tokens=500))
    for _ in range(3):
        engine.step()
    for index in range(3):
        engine.add_request(request(str(index), prompt(160, 5 + index), max_new_tokens=1, priority=index))
    done = []
    for _ in range(32):
        done += [output.request_id for output in engine.step().outputs if output.request_id != "running"]
        sizes = [len(chunk.token_ids) for chunk in runner.chunks[-1]]
        assert sizes in ([1, MIN_CHUNK], [1])
    print(f"{done} are done after {len(runner.chunks)} steps")
    assert done == ["2", "1", "0"]


def test_without_a_bound_the_budget_is_all():
    engine, runner = timed(Machine(), 0.0)
    engine.add_request(request("running", prompt(10, 0), max_new_tokens=500))
    engine.step()
    engine.add_request(request("long", prompt(3000, 1), max_new_tokens=1))
    engine.step()
    assert [len(chunk.token_ids) for chunk in runner.chunks[-1]] == [1, 1023]
