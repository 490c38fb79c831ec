"""The device's memory: what goes to the cache, what a step takes, and the figures.

CUDA's own answers are made up here; tests/cuda asks a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mock_engine import VOCAB
from prometheus_client import CollectorRegistry

from treadle_worker.block_manager import BlockManager
from treadle_worker.config import EngineConfig
from treadle_worker.convert import to_engine_status
from treadle_worker.cuda.memory import MemoryWatch, read_memory
from treadle_worker.cuda.profile import activation_bytes, largest_step
from treadle_worker.engine import Engine
from treadle_worker.engine_loader import choose_num_blocks
from treadle_worker.engine_protocol import DeviceMemory, EngineStart, EngineStats
from treadle_worker.metrics import WorkerMetrics
from treadle_worker.sampler import Sampler
from treadle_worker.scheduler import Scheduler

GIB = 1 << 30


def start(**changes) -> EngineStart:
    return EngineStart(model_folder="folder", **EngineConfig(**changes).model_dump())


@pytest.fixture
def plan(monkeypatch):
    """Of a GPU with 80 GiB, 16 of them taken by a model and 4 by somebody else."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16 * GIB)
    return SimpleNamespace(device=torch.device("cuda"), bytes_per_block=1 << 20, num_reserved_blocks=2)


def test_a_share_of_the_device_holds_weights_steps_and_blocks(plan):
    blocks = choose_num_blocks(start(max_memory_percent=50), plan, activations=3 * GIB)
    assert blocks == (40 - 16 - 3) * 1024 - 2
    assert choose_num_blocks(start(max_memory_percent=90), plan, activations=0) == 56 * 1024 - 2


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"max_memory_percent": 20}, "holds no block: .* beside the 3221225472 that the largest step takes"),
        ({"num_blocks": 57 * 1024 - 1}, f"ask for at most {57 * 1024 - 2} blocks"),
        ({"kv_cache_bytes": 58 * GIB}, f"where {57 * GIB} are free with the model loaded"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_figures(plan, asked, why):
    with pytest.raises(MemoryError, match=why):
        choose_num_blocks(start(**asked), plan, activations=3 * GIB)
    assert choose_num_blocks(start(num_blocks=57 * 1024 - 2), plan, activations=3 * GIB) == 57 * 1024 - 2


@pytest.mark.parametrize(
    ("num_seqs", "budget", "context", "lengths"),
    [
        (4, 100, 512, [97, 1, 1, 1]),
        (4, 100, 40, [40, 40, 19, 1]),
        (4, 100, 20, [20, 20, 20, 20]),
        (64, 16, 512, [1] * 16),
    ],
)
def test_the_largest_step_is_as_large_as_one_may_be(num_seqs, budget, context, lengths):
    assert largest_step(num_seqs, budget, context) == lengths


class StandIn:
    """A runner with a cache of one block, which keeps what it was given."""

    def __init__(self) -> None:
        self.device, self.cache = torch.device("cpu"), SimpleNamespace(block_size=16)
        self.steps = []

    def run(self, chunks):
        self.steps.append(chunks)
        return torch.randn(sum(chunk.num_logits for chunk in chunks), VOCAB)

    def close(self) -> None:
        self.steps.clear()


@pytest.mark.parametrize(("graphs", "total"), [(nullcontext(), 300), (None, 200)])
def test_steps_are_measured_at_the_end_of_the_longest_context(graphs, total: int):
    runner, given = StandIn(), iter([200, 100])

    def measure(device, compute) -> int:
        compute()
        return next(given)

    taken = activation_bytes(
        runner,
        max_num_seqs=4,
        max_rows=6,
        max_num_batched_tokens=100,
        max_model_len=90,
        max_score_rows=93,
        graphs=graphs,
        measure=measure,
    )
    assert taken == total
    prompts, tokens = runner.steps
    assert [len(chunk.token_ids) for chunk in prompts] == [90, 8, 1, 1]
    assert [len(chunk.token_ids) for chunk in tokens] == [1] * 6
    assert [chunk.num_logits for chunk in prompts] == [90, 5, 1, 1], "93 rows beside those of four answers"
    assert [chunk.num_logits for chunk in tokens] == [1] * 6
    for chunk in prompts + tokens:
        assert chunk.start + len(chunk.token_ids) == 90
        assert chunk.block_table == [0] * 6


def test_figures_are_read_once_a_second_and_reach_status_and_metrics():
    now, reads = [100.0], []

    def read(device) -> DeviceMemory:
        reads.append(device)
        size = 1000 * len(reads)
        return DeviceMemory(
            allocated_bytes=size, reserved_bytes=size + 1, peak_bytes=size + 2, total_bytes=9000
        )

    watch = MemoryWatch(torch.device("cuda:1"), read=read, clock=lambda: now[0])
    engine = Engine(
        StandIn(),
        Scheduler(BlockManager(4, 16), max_num_seqs=2, max_num_batched_tokens=16),
        Sampler(),
        vocab_size=VOCAB,
        max_model_len=64,
        device_memory=watch,
    )
    seen = []
    for seconds in [0.0, 0.5, 0.6, 0.1, 1.0]:
        now[0] += seconds
        seen.append(engine.stats().device_memory.allocated_bytes)
    assert seen == [1000, 1000, 2000, 2000, 3000]
    assert reads == [torch.device("cuda:1")] * 3

    status = to_engine_status(engine.stats(), 1, 2)
    assert (status.device_allocated_bytes, status.device_reserved_bytes) == (3000, 3001)
    assert (status.device_peak_bytes, status.device_total_bytes) == (3002, 9000)

    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry).model("m")
    name = "treadle:engine_device_memory_{}_bytes"

    def told() -> list[float | None]:
        return [
            registry.get_sample_value(name.format(kind), {"model_name": "m"})
            for kind in ("allocated", "reserved", "peak")
        ]

    metrics.engine_ready(lambda: 0.0, DeviceMemory(allocated_bytes=5, reserved_bytes=6, peak_bytes=7))
    assert told() == [5, 6, 7]
    metrics.step(engine.stats())
    assert told() == [3000, 3001, 3002]
    metrics.step(EngineStats())
    metrics.step(engine.stats())
    metrics.engine_gone()
    assert told() == [0, 0, 0]
    print(f"{len(reads)} readings for {len(seen)} looks")


def test_a_cpu_has_no_figures():
    assert read_memory(torch.device("cpu")) == DeviceMemory()
