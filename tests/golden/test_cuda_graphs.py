"""The CUDA path on a CPU: its cache, attention and graphs under the same scheduler and model runner."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from attention_packages import FLASHINFER, FlashAttn
from profiles import CPU, SDPA_FLOAT32, TORCH_FLOAT32
from recorder import Recorder, Rerunner
from tiny_models import VOCABULARY, make

from treadle_worker.batch import ScheduledChunk
from treadle_worker.block_manager import BlockManager
from treadle_worker.config import EngineConfig
from treadle_worker.cuda_flash_attn import FlashAttnBackend
from treadle_worker.cuda_flashinfer import FlashInferBackend
from treadle_worker.cuda_graphs import DecodeGraphs
from treadle_worker.cuda_kv_cache import CudaKVCache
from treadle_worker.cuda_profile import activation_bytes
from treadle_worker.cuda_sdpa import SdpaBackend
from treadle_worker.engine import Engine
from treadle_worker.engine_loader import capture_graphs, load_engine
from treadle_worker.engine_protocol import AddRequest, EngineStart, SamplingParams
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


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return random.Random(seed)


def cuda_cache(config, backend) -> CudaKVCache:
    """Blocks are full of NaN, but for the one that is read as padding."""
    cache = CudaKVCache(NUM_BLOCKS, BLOCK_SIZE, config, torch.float32, CPU, backend)
    for part in (cache.keys, cache.values):
        part.fill_(torch.nan)
    cache.clear(torch.tensor([cache.zero_block]))
    return cache


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "sdpa") for kind in ("llama3", "qwen2_window", "qwen3")),
        ("qwen2_window", "flash_attn"),
        ("qwen2_window", "flashinfer"),
    ],
)
def test_padded_replays_equal_eager_steps(monkeypatch, tmp_path, rng, kind: str, backend: str):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttn())
    monkeypatch.setitem(sys.modules, "flashinfer", FLASHINFER)
    monkeypatch.setattr("treadle_worker.cuda_graphs.SHORTEST_KEYS", 64)
    make(kind, tmp_path, rng.randrange(1 << 31))
    model = TORCH_FLOAT32.load(tmp_path)
    attends = {
        "sdpa": SdpaBackend,
        "flash_attn": FlashAttnBackend,
        "flashinfer": lambda: FlashInferBackend(CPU),
    }[backend]()
    cache = cuda_cache(model.config, attends)
    replaying, eager = ModelRunner(model, cache), ModelRunner(model, cuda_cache(model.config, SdpaBackend()))
    capture = Recorder() if backend == "sdpa" else Rerunner()
    graphs = DecodeGraphs(model, cache, capture, max_rows=9, max_chunk=4, max_model_len=160)
    replaying.graphs = graphs
    assert {rows for rows, _ in graphs.sizes} == {1, 2, 4, 8, 9}
    assert {width for _, width in graphs.sizes} == ({4, 8, 10} if backend == "sdpa" else {10})
    assert cache.keys[:, cache.scratch_block, 0].isfinite().all(), "padding was captured"
    assert cache.keys[:, :NUM_BLOCKS].isnan().all(), "a capture writes where nobody is"

    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    rows = [
        Row([rng.randrange(VOCABULARY) for _ in range(length)], [free.pop() for _ in range(-(-length // 16))])
        for length in (rng.randint(30, 150) for _ in range(9))
    ]
    used = {block for row in rows for block in row.table}
    assert used.isdisjoint({cache.zero_block, cache.scratch_block})
    compared, padded, drafted, worst = 0, 0, 0, 0.0
    for row in rows:
        chunks = [row.chunk(rng.randint(5, min(20, len(row.tokens) - 10)), 1)]
        worst = max(worst, difference(replaying, eager, chunks))
    assert graphs.num_eager == len(rows), "prompts are no steps for graphs"
    while left := [row for row in rows if row.done < len(row.tokens)]:
        step, chunks = rng.sample(left, rng.randint(1, len(left))), []
        for row in step:
            length = min(rng.choice([1, 1, 1, 4]), len(row.tokens) - row.done)
            if sum(len(chunk.token_ids) for chunk in chunks) + length > 9:
                break
            chunks.append(row.chunk(length, length))
        before = graphs.num_replays.copy()
        worst = max(worst, difference(replaying, eager, chunks))
        ((bucket, _),) = graphs.num_replays - before
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        compared += num_tokens
        padded += bucket - num_tokens
        drafted += sum(len(chunk.token_ids) > 1 for chunk in chunks)
    assert graphs.num_eager == len(rows)
    print(
        f"{compared} rows of logits off by {worst:.1e} at most; {graphs.num_replays.total()} replays of "
        f"{len(graphs.num_replays)} of {len(graphs.sizes)} graphs, {padded} rows of padding, {drafted} drafts"
    )
    if isinstance(capture, Recorder):
        print(f"{capture.num_operations} operations recorded, {capture.num_replayed} replays")
        assert capture.num_replayed == graphs.num_replays.total()
    assert min(compared, padded, drafted) > 0
    assert len(graphs.num_replays) >= 4
    assert worst < 1e-4
    others = [block for block in range(NUM_BLOCKS) if block not in used]
    assert cache.keys[:, others].isnan().all(), "padding touched a block that is somebody's"
    assert not cache.keys[:, cache.zero_block].any()
    assert not cache.values[:, cache.zero_block].any()


def difference(one: ModelRunner, other: ModelRunner, chunks: list[ScheduledChunk]) -> float:
    """The largest of a step's logits."""
    left, right = one.run(chunks), other.run(chunks)
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


def test_an_engine_with_graphs_answers_as_one_without(tmp_path, rng):
    """Greedily, with chunked prompts, drafts, shared prefixes and preemption."""
    make("qwen2_window", tmp_path, rng.randrange(1 << 31))
    model, num_blocks = TORCH_FLOAT32.load(tmp_path), 16
    shared = [rng.randrange(VOCABULARY) for _ in range(40)]
    requests = []
    for index in range(14):
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 60))]
        prompt = rng.choice([own, shared + own, own[:6] * 8])
        params = SamplingParams(temperature=0.0, max_new_tokens=rng.randint(30, 80))
        requests.append(AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=params))
    plain = engine(ModelRunner(model, TORCH_FLOAT32.cache(model.config, num_blocks, BLOCK_SIZE)), num_blocks)
    expected = answers(plain, requests)

    runner = ModelRunner(model, SDPA_FLOAT32.cache(model.config, num_blocks, BLOCK_SIZE))
    assert isinstance(runner.cache, CudaKVCache)
    runner.graphs = DecodeGraphs(model, runner.cache, Recorder(), max_rows=8, max_chunk=4, max_model_len=200)
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


def test_the_largest_steps_run_over_one_block(tmp_path, rng):
    """As the profile before the cache is made does: the figures are CUDA's, the steps run anywhere."""
    make("qwen2_window", tmp_path, rng.randrange(1 << 31))
    model, shapes = TORCH_FLOAT32.load(tmp_path), []
    cache = CudaKVCache(1, BLOCK_SIZE, model.config, torch.float32, CPU, SdpaBackend())
    runner = ModelRunner(model, cache)

    def measure(device, compute) -> int:
        compute()
        shapes.append(device.type)
        return 1

    sizes = {"max_num_seqs": 6, "max_rows": 8, "max_num_batched_tokens": 100, "max_model_len": 70}
    assert activation_bytes(runner, **sizes, graphs=True, measure=measure) == 2
    print(f"{len(shapes)} steps, {cache.keys[:, 0].count_nonzero()} elements written")
    assert cache.keys[:, 0].count_nonzero() > 0
    assert not cache.keys[:, 1:].any(), "only the one block"


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_nothing_keeps_what_an_engine_held(tiny_llama_folder, backend: str):
    config = EngineConfig(
        device="cpu",
        attention_backend=backend,
        max_num_seqs=4,
        max_model_len=64,
        num_blocks=16,
        num_threads=1,
    )
    start = EngineStart(model_folder=str(tiny_llama_folder), **config.model_dump())
    loaded = load_engine(start)
    runner, held = loaded.runner, []
    if backend == "sdpa":
        runner.graphs = capture_graphs(start, runner, 64, Rerunner())
        held += [graph.buffers.flat for graph in runner.graphs._graphs.values()]
    params = SamplingParams(max_new_tokens=20, logprobs=2, repetition_penalty=1.1)
    loaded.add_request(AddRequest(request_id="a", prompt_token_ids=[1, 2, 3], sampling=params))
    for _ in range(8):
        loaded.step()
    held += [*runner.model.parameters(), runner.cache.keys, runner.cache.values, *runner.cache.rotary.tables]
    seen = [weakref.ref(tensor) for tensor in held] + [weakref.ref(runner.model), weakref.ref(runner.cache)]
    if runner.graphs is not None:
        assert runner.graphs.num_replays.total() > 0
        seen.append(weakref.ref(runner.graphs))
    del held
    assert all(one() is not None for one in seen)
    loaded.close()
    gc.collect()
    print(f"{len(seen)} tensors and modules, {sum(one() is not None for one in seen)} still there")
    assert not any(one() is not None for one in seen)
    assert not loaded.has_work
