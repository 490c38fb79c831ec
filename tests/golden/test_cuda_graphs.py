"""The CUDA path on a CPU: its cache, attention and graphs under the same scheduler and model runner."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from attention_packages import FLASHINFER, FlashAttn
from cuda_checks import BLOCK_SIZE, compare_engines, compare_replays, compare_scores
from profiles import CPU, TORCH_FLOAT32
from recorder import Recorder, Rerunner
from tiny_models import make

from treadle_worker.config import EngineConfig
from treadle_worker.cuda.flash_attn import FlashAttnBackend
from treadle_worker.cuda.flashinfer import FlashInferBackend
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.profile import activation_bytes
from treadle_worker.cuda.sdpa import SdpaBackend
from treadle_worker.engine_loader import capture_graphs, load_engine
from treadle_worker.engine_protocol import AddRequest, EngineStart, SamplingParams
from treadle_worker.model_runner import ModelRunner


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
    monkeypatch.setattr("treadle_worker.cuda.graphs.SHORTEST_KEYS", 64)
    attends = {
        "sdpa": SdpaBackend,
        "flash_attn": FlashAttnBackend,
        "flashinfer": lambda: FlashInferBackend(CPU),
    }[backend]()
    capture = Recorder() if backend == "sdpa" else Rerunner()
    graphs, seen = compare_replays(kind, tmp_path, rng, attends, CPU, capture)
    if isinstance(capture, Recorder):
        print(f"{capture.num_operations} operations recorded, {capture.num_replayed} replays")
        assert capture.num_replayed == graphs.num_replays.total()
    assert seen.worst < 1e-4


def test_an_engine_with_graphs_answers_as_one_without(tmp_path, rng):
    """Greedily, with chunked prompts, drafts, shared prefixes and preemption."""
    compare_engines(tmp_path, rng, CPU, Recorder())


def test_an_engine_with_graphs_scores_as_one_without(tmp_path, rng):
    assert compare_scores(tmp_path, rng, CPU, Recorder()) < 1e-4


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
    sizes["max_score_rows"] = 50
    assert activation_bytes(runner, **sizes, graphs=nullcontext(), measure=measure) == 2
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
