"""Logits, answers and draws of a GPU, with graphs of its own, against the CPU's."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch
from attention_packages import attend
from cuda_checks import answers, compare_engines, compare_replays, compare_scores, engine, requests_like
from msgspec.structs import replace
from tiny_models import KINDS, make

from treadle.models.config import parse_config
from treadle.nn.loader import load_model
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.backends import PACKAGES
from treadle_worker.cuda.graphs import CudaCapture, DecodeGraphs
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.sdpa import SdpaBackend
from treadle_worker.cuda.step import Places, Staging
from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.kv_cache import CachePlan
from treadle_worker.model_runner import ModelRunner
from treadle_worker.sampler import Sampler, SampleRow

PARAMETERS = [
    SamplingParams(max_new_tokens=1, temperature=0.0),
    SamplingParams(max_new_tokens=1, temperature=0.7, logprobs=3),
    SamplingParams(max_new_tokens=1, temperature=1.0, top_k=20),
    SamplingParams(max_new_tokens=1, temperature=1.3, top_p=0.8),
    SamplingParams(max_new_tokens=1, temperature=0.9, min_p=0.05, logit_bias={3: 2.5}),
]


@pytest.mark.parametrize("kind", KINDS)
def test_replays_equal_the_cpus_steps(monkeypatch, tmp_path, rng, device, kind: str):
    monkeypatch.setattr("treadle_worker.cuda.graphs.SHORTEST_KEYS", 64)
    _, seen = compare_replays(kind, tmp_path, rng, SdpaBackend(), device, CudaCapture(device))
    assert seen.worst < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "flashinfer"])
def test_replays_in_half_types_are_as_good(
    monkeypatch, tmp_path, rng, device, backend: str, dtype: torch.dtype
):
    """Heads of 64 elements, as the packages ask for, with a window in one layer and none in the others."""
    monkeypatch.setattr("treadle_worker.cuda.graphs.SHORTEST_KEYS", 64)
    attends = SdpaBackend() if backend == "sdpa" else PACKAGES[installed(backend)].build(device)
    _, seen = compare_replays(
        "qwen2_window", tmp_path, rng, attends, device, CudaCapture(device), dtype=dtype, hidden_size=384
    )
    assert seen.worst < {torch.bfloat16: 0.4, torch.float16: 0.06}[dtype]


def installed(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return package


def test_an_engine_answers_as_the_cpus(tmp_path, rng, device):
    compare_engines(tmp_path, rng, device, CudaCapture(device))


def test_an_engine_scores_as_the_cpus(tmp_path, rng, device):
    assert compare_scores(tmp_path, rng, device, CudaCapture(device)) < 2e-4


@pytest.mark.parametrize("seed", range(3))
def test_drawn_answers_are_the_cpus(tmp_path, rng, device, seed: int):
    """Drafts and penalties included: the draws are made from the same numbers, off by rounding alone."""
    make("llama3", tmp_path, rng.randrange(1 << 31))
    params = {"temperature": 0.9, "top_p": 0.95, "seed": rng.randrange(1 << 40), "repetition_penalty": 1.1}
    requests, said = requests_like(rng, **params), []
    for place in (torch.device("cpu"), device):
        model = load_model(tmp_path, torch.float32, place, kernels="torch")
        plan = CachePlan(model.config, 16, torch.float32, place, kernels="torch")
        runner = ModelRunner(model, plan.build(40))
        if isinstance(runner.cache, CudaKVCache):
            runner.graphs = DecodeGraphs(
                model, runner.cache, CudaCapture(place), max_rows=8, max_chunk=4, max_model_len=200
            )
        said.append(answers(engine(runner, 40), requests))
        assert (runner.graphs is not None) == (place.type == "cuda")
    cpu, cuda = said
    equal = sum(cuda[name] == cpu[name] for name in cpu)
    print(f"{equal} of {len(cpu)} answers, {sum(map(len, cpu.values()))} tokens")
    assert equal >= len(cpu) - 1, "one may meet a draw that rounding decides"


def test_draws_from_the_same_logits(rng, device):
    generator = torch.Generator().manual_seed(rng.randrange(1 << 31))
    rows, vocabulary, equal, compared = 200, 5000, 0, 0
    logits = 4 * torch.randn(rows, vocabulary, generator=generator)
    asked = [
        SampleRow(replace(PARAMETERS[row % len(PARAMETERS)], seed=rng.randrange(1 << 60)), row)
        for row in range(rows)
    ]
    cpu = Sampler().sample(logits.clone(), asked)
    cuda = Sampler().sample(logits.to(device), asked)
    for one, other in zip(cpu, cuda, strict=True):
        assert one is not None
        assert other is not None
        compared += 1
        equal += one.token_id == other.token_id
    print(f"{equal} of {compared} draws")
    assert equal >= compared - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", *PACKAGES])
def test_attention_against_float64(rng: random.Random, device, dtype: torch.dtype, backend: str):
    """Prompts' chunks and single tokens of sequences up to 3,000 keys, with and without a window."""
    if backend != "sdpa":
        installed(backend)
    block_size = 256 if backend == "flash_attn" else 32
    window = rng.choice([None, 100])
    config = attention_config(window)
    if backend != "sdpa" and PACKAGES[backend].refuses(config, block_size, dtype):
        pytest.skip(f"{backend} has no {dtype}")
    plan = CachePlan(config, block_size, dtype, device, attention_backend=backend)
    worst, chunks_seen = 0.0, 0
    for _ in range(4):
        lengths = [rng.randint(1, 3000) for _ in range(rng.randint(1, 12))]
        held = [-(-length // block_size) for length in lengths]
        cache = plan.build(sum(held))
        order = rng.sample(range(sum(held)), sum(held))
        tables = [[order.pop() for _ in range(count)] for count in held]
        sequences = [torch.randn(3, length, 8, 64, device=device, dtype=dtype) for length in lengths]
        chunks, queries = [], []
        for length, table, qkv in zip(lengths, tables, sequences, strict=True):
            new = rng.choice([1, length, rng.randint(1, length)])
            chunks.append(ScheduledChunk([0] * new, length - new, table, 1))
            queries.append(qkv[0, length - new :])
            whole = ScheduledChunk([0] * length, 0, table, 1)
            slots = torch.from_numpy(Places.of([whole], block_size).slots_T).to(device)
            cache.write(0, slots, qkv[1][:, :2], qkv[2][:, :2])
        staging = Staging()
        staging.add(Places.of(chunks, block_size).positions_T)
        mixed = cache.backend.step(cache, chunks, staging)(staging.send(device))(0, torch.cat(queries))
        row = 0
        for chunk, qkv in zip(chunks, sequences, strict=True):
            new = len(chunk.token_ids)
            q, k, v = qkv[0, chunk.start :].double(), qkv[1][:, :2], qkv[2][:, :2]
            expected = attend(q, k, v, causal=True, window=(window - 1, 0) if window else (-1, -1))
            worst = max(worst, (mixed[row : row + new].double() - expected).abs().max().item())
            row += new
            chunks_seen += 1
        assert row == len(mixed)
    print(f"{chunks_seen} chunks, off by {worst:.1e} at most")
    assert worst < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def attention_config(window: int | None):
    """8 query heads on 2 key heads of 64."""
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": window,
    }
    return parse_config(config)


def test_an_int8_cache_computes_on_the_device(tmp_path, rng, device):
    make("qwen3", tmp_path, rng.randrange(1 << 31))
    tokens, seen = [rng.randrange(97) for _ in range(70)], []
    for place in (torch.device("cpu"), device):
        model = load_model(tmp_path, torch.float32, place, kernels="torch")
        plan = CachePlan(model.config, 16, torch.int8, place, kernels="torch")
        runner = ModelRunner(model, plan.build(5))
        first = runner.run([ScheduledChunk(tokens[:60], 0, list(range(5)), 60)])
        second = runner.run([ScheduledChunk(tokens[60:], 60, list(range(5)), 10)])
        seen.append(torch.cat([first, second]).cpu())
    worst = (seen[0] - seen[1]).abs().max().item()
    print(f"{len(tokens)} rows of logits off by {worst:.1e} at most")
    assert worst < 0.1 * seen[0].std().item(), "an element at the edge of two of 255 steps may fall to either"
