"""The CUDA path against plain eager steps, on whichever device: a step at a time, and whole answers.

`tests/golden` runs it on a CPU with stand-ins for graphs, `tests/cuda` on a GPU with its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mock_engine import read_scores, run_tasks, score_task
from profiles import TORCH_FLOAT32
from tiny_models import VOCABULARY, make

from treadle.nn.loader import load_model
from treadle_worker.batch import ScheduledChunk
from treadle_worker.block_manager import BlockManager
from treadle_worker.cuda.attention import AttentionBackend
from treadle_worker.cuda.graphs import Capture, DecodeGraphs
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.sdpa import SdpaBackend
from treadle_worker.engine import Engine
from treadle_worker.engine_protocol import AddRequest, SamplingParams
from treadle_worker.model_runner import ModelRunner
from treadle_worker.sampler import Sampler
from treadle_worker.scheduler import Scheduler
from treadle_worker.speculation import Speculation

BLOCK_SIZE = 16
NUM_BLOCKS = 200


@dataclass
class Row:
    """A sequence of random tokens, computed up to `done`."""

    tokens: list[int]
    table: list[int]
    done: int = 0

    def chunk(self, length: int, num_logits: int) -> ScheduledChunk:
        start, self.done = self.done, self.done + length
        return ScheduledChunk(self.tokens[start : self.done], start, self.table, num_logits)


def cuda_cache(
    config,
    backend: AttentionBackend,
    device: torch.device,
    num_blocks: int = NUM_BLOCKS,
    dtype: torch.dtype = torch.float32,
) -> CudaKVCache:
    """Blocks are full of NaN, but for the one that is read as padding."""
    cache = CudaKVCache(num_blocks, BLOCK_SIZE, config, dtype, device, backend)
    for part in (cache.keys, cache.values):
        part.fill_(torch.nan)
    cache.clear(torch.tensor([cache.zero_block], device=device))
    return cache


@dataclass
class Replays:
    """What was compared."""

    compared: int = 0
    padded: int = 0
    drafted: int = 0
    worst: float = 0.0


def compare_replays(
    kind: str,
    folder: Path,
    rng: random.Random,
    backend: AttentionBackend,
    device: torch.device,
    capture: Capture,
    *,
    dtype: torch.dtype = torch.float32,
    **sizes: object,
) -> tuple[DecodeGraphs, Replays]:
    """Steps with graphs on the device against eager ones on the CPU in float32, logit by logit."""
    make(kind, folder, rng.randrange(1 << 31), **sizes)
    reference, num_rows = TORCH_FLOAT32.load(folder), 9
    model = load_model(folder, dtype, device, kernels="torch")
    cache = cuda_cache(model.config, backend, device, dtype=dtype)
    eager = ModelRunner(reference, cuda_cache(model.config, SdpaBackend(), torch.device("cpu")))
    replaying = ModelRunner(model, cache)
    graphs = DecodeGraphs(model, cache, capture, max_rows=num_rows, max_chunk=4, max_model_len=160)
    replaying.graphs = graphs
    assert {rows for rows, _ in graphs.sizes} == {1, 2, 4, 8, 9}
    assert {width for _, width in graphs.sizes} == ({4, 8, 10} if backend.gathers else {10})
    assert cache.keys[:, cache.scratch_block, 0].isfinite().all(), "padding was captured"
    assert cache.keys[:, :NUM_BLOCKS].isnan().all(), "a capture writes where nobody is"

    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    rows = [
        Row([rng.randrange(VOCABULARY) for _ in range(length)], [free.pop() for _ in range(-(-length // 16))])
        for length in (rng.randint(30, 150) for _ in range(num_rows))
    ]
    used = {block for row in rows for block in row.table}
    assert used.isdisjoint({cache.zero_block, cache.scratch_block})
    seen = Replays()
    for row in rows:
        chunks = [row.chunk(rng.randint(5, min(20, len(row.tokens) - 10)), 1)]
        seen.worst = max(seen.worst, difference(replaying, eager, chunks))
    assert graphs.num_eager == len(rows), "prompts are no steps for graphs"
    while left := [row for row in rows if row.done < len(row.tokens)]:
        step, chunks = rng.sample(left, rng.randint(1, len(left))), []
        for row in step:
            length = min(rng.choice([1, 1, 1, 4]), len(row.tokens) - row.done)
            if sum(len(chunk.token_ids) for chunk in chunks) + length > num_rows:
                break
            chunks.append(row.chunk(length, length))
        before = graphs.num_replays.copy()
        seen.worst = max(seen.worst, difference(replaying, eager, chunks))
        ((bucket, _),) = graphs.num_replays - before
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        seen.compared += num_tokens
        seen.padded += bucket - num_tokens
        seen.drafted += sum(len(chunk.token_ids) > 1 for chunk in chunks)
    assert graphs.num_eager == len(rows)
    others = [block for block in range(NUM_BLOCKS) if block not in used]
    assert cache.keys[:, others].isnan().all(), "padding touched a block that is somebody's"
    assert not cache.keys[:, cache.zero_block].any()
    assert not cache.values[:, cache.zero_block].any()
    print(
        f"{seen.compared} rows of logits off by {seen.worst:.1e} at most; {graphs.num_replays.total()} "
        f"replays of {len(graphs.num_replays)} of {len(graphs.sizes)} graphs, {seen.padded} rows of padding, "
        f"{seen.drafted} drafts"
    )
    assert min(seen.compared, seen.padded, seen.drafted) > 0
    assert len(graphs.num_replays) >= 4
    return graphs, seen


def difference(one: ModelRunner, other: ModelRunner, chunks: list[ScheduledChunk]) -> float:
    """The largest of a step's logits."""
    left, right = one.run(chunks).cpu(), other.run(chunks).cpu()
    assert left.shape == right.shape
    assert left.isfinite().all()
    return (left - right).abs().max().item()


@dataclass
class Watched:
    """A runner that remembers which blocks it was given."""

    runner: ModelRunner
    blocks: set[int] = field(default_factory=set)

    def run(self, chunks):
        self.blocks.update(block for chunk in chunks for block in chunk.block_table)
        return self.runner.run(chunks)


def engine(runner, num_blocks: int) -> Engine:
    return Engine(
        runner,
        Scheduler(
            BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            speculation=Speculation(3, 8),
        ),
        Sampler(),
        vocab_size=VOCABULARY,
        max_model_len=200,
    )


def answers(engine: Engine, requests: list[AddRequest]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error == ""
            said[output.request_id] += output.token_ids
    return said


def requests_like(rng: random.Random, **sampling) -> list[AddRequest]:
    """Prompts with shared beginnings and repetitions, more than fit at once. The first is longer than a step,
    and the second begins as it does."""
    shared, requests = [rng.randrange(VOCABULARY) for _ in range(40)], []
    for index in range(14):
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(30 if index < 2 else 1, 60))]
        prompt = shared + own if index < 2 else rng.choice([own, shared + own, own[:6] * 8])
        params = SamplingParams(max_new_tokens=rng.randint(30, 80), **sampling)
        requests.append(AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=params))
    return requests


def compare_engines(folder: Path, rng: random.Random, device: torch.device, capture: Capture) -> None:
    """Whole answers with graphs on the device against torch's operations on the CPU."""
    make("qwen2_window", folder, rng.randrange(1 << 31))
    reference, num_blocks = TORCH_FLOAT32.load(folder), 16
    model = load_model(folder, torch.float32, device, kernels="torch")
    requests = requests_like(rng, temperature=0.0)
    plain = ModelRunner(reference, TORCH_FLOAT32.cache(reference.config, num_blocks, BLOCK_SIZE))
    expected = answers(engine(plain, num_blocks), requests)

    runner = ModelRunner(model, cuda_cache(model.config, SdpaBackend(), device, num_blocks))
    runner.graphs = DecodeGraphs(model, runner.cache, capture, max_rows=8, max_chunk=4, max_model_len=200)
    watched = Watched(runner)
    tested = engine(watched, num_blocks)
    assert answers(tested, requests) == expected
    stats = tested.stats()
    print(
        f"{stats.num_output_tokens} tokens, {runner.graphs.num_replays.total()} replays, "
        f"{runner.graphs.num_eager} eager steps, {stats.num_preemptions} preemptions, "
        f"{stats.prefix_cache_hits} cached tokens, {stats.num_accepted_tokens} accepted of drafts"
    )
    assert min(runner.graphs.num_replays.total(), runner.graphs.num_eager) > 0
    assert min(stats.num_preemptions, stats.prefix_cache_hits, stats.num_draft_tokens) > 0
    assert watched.blocks == set(range(num_blocks)), "every block was dealt out, and no other"
    assert {runner.cache.zero_block, runner.cache.scratch_block} == {num_blocks, num_blocks + 1}


def compare_scores(folder: Path, rng: random.Random, device: torch.device, capture: Capture) -> float:
    """By how much log-probabilities of texts, with graphs on the device, differ at most from those of torch's
    operations on the CPU. The first texts are short enough for a graph; the others are scored beside answers.
    """
    make("qwen2_window", folder, rng.randrange(1 << 31))
    model = load_model(folder, torch.float32, device, kernels="torch")
    runner = ModelRunner(model, cuda_cache(model.config, SdpaBackend(), device, NUM_BLOCKS))
    runner.graphs = DecodeGraphs(model, runner.cache, capture, max_rows=8, max_chunk=4, max_model_len=200)
    reference = TORCH_FLOAT32.load(folder)
    plain = ModelRunner(reference, TORCH_FLOAT32.cache(reference.config, NUM_BLOCKS, BLOCK_SIZE))
    tasks = []
    for index, length in enumerate([2, 3, 4, 2, 150, *(rng.randint(2, 120) for _ in range(10))]):
        text = [rng.randrange(VOCABULARY) for _ in range(length)]
        tasks.append(score_task(f"t{index}", (text, rng.randint(1, length - 1))))
    expected = run_tasks(engine(plain, NUM_BLOCKS), *tasks)
    tested = engine(runner, NUM_BLOCKS)
    found = run_tasks(tested, *tasks[:4])
    assert (runner.graphs.num_replays.total(), runner.graphs.num_eager) == (1, 0)
    found |= run_tasks(tested, *requests_like(rng, temperature=0.0)[:3], *tasks[4:])
    worst, compared = 0.0, 0
    for name, output in expected.items():
        assert found[name].error == output.error == ""
        pairs = zip(read_scores(found[name].data), read_scores(output.data), strict=True)
        differences = [abs(one - other) for (_, one), (_, other) in pairs]
        worst, compared = max(worst, *differences), compared + len(differences)
    replays = runner.graphs.num_replays.total()
    print(f"{compared} scores off by {worst:.1e} at most; {replays} replays, {runner.graphs.num_eager} eager")
    assert min(compared, replays, runner.graphs.num_eager) > 0
    return worst
