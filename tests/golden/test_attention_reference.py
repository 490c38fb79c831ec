"""Paged attention against a slow reference in float64, over random shapes, tables and chunks."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import pytest
import torch
from attention_packages import FLASHINFER, BatchPrefillWithPagedKVCacheWrapper, FlashAttn
from profiles import (
    BFLOAT16,
    CPU,
    FLOAT32,
    INT8_CACHE,
    SDPA_BFLOAT16,
    SDPA_FLOAT32,
    TORCH_BFLOAT16,
    TORCH_FLOAT32,
    Profile,
)

from treadle.models.config import parse_config
from treadle.nn.rope import RotaryEmbedding, rotate
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.flash_attn import FlashAttnBackend
from treadle_worker.cuda.flashinfer import FlashInferBackend
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.kv_cache import begin_step


@dataclass
class Sequence:
    """Random projections of every layer [layers, tokens, X], and the heads that they are once turned."""

    qkv: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: list[int]
    done: int = 0


def reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int | None
) -> torch.Tensor:
    """One query [H, D] over the keys and values [L, K, D] of its own past."""
    first = 0 if window is None else max(0, position + 1 - window)
    group = queries.shape[0] // keys.shape[1]
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for head, query in enumerate(queries.double()):
        seen_keys = keys[first : position + 1, head // group].double()
        seen_values = values[first : position + 1, head // group].double()
        scores = torch.stack([query @ key for key in seen_keys]) / query.shape[0] ** 0.5
        for weight, value in zip(scores.softmax(0), seen_values, strict=True):
            out[head] += weight * value
    return out


def random_config(rng: random.Random):
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 7])
    head_dim = rng.choice([16, 32, 48, 64, 128])
    window = rng.choice([None, 1, 5, 16, 33])
    return parse_config(
        {
            "model_type": "qwen2",
            "vocab_size": 10,
            "hidden_size": kv_heads * group * head_dim,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 512,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 1,
        }
    )


LIMITS = [
    (FLOAT32, 2e-5),
    (BFLOAT16, 2**-5),
    (INT8_CACHE, 2**-4),
    (TORCH_FLOAT32, 2e-5),
    (TORCH_BFLOAT16, 2**-5),
    (SDPA_FLOAT32, 2e-5),
    (SDPA_BFLOAT16, 2**-5),
]


@pytest.mark.parametrize(("profile", "limit"), LIMITS, ids=lambda value: getattr(value, "name", ""))
def test_random_steps_equal_the_reference(profile: Profile, limit: float):
    check_random_steps(profile.cache, limit)


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_packages_are_told_of_a_step_as_documented(monkeypatch, name: str):
    """They need a GPU: what stands in for them does what their documentation says."""
    package = FlashAttn() if name == "flash_attn" else FLASHINFER
    monkeypatch.setitem(sys.modules, name, package)
    backend = FlashAttnBackend() if name == "flash_attn" else FlashInferBackend(CPU)

    def cache(config, num_blocks: int, block_size: int) -> CudaKVCache:
        if name == "flashinfer":
            backend._wrappers.clear()  # of another model
        made = CudaKVCache(num_blocks, block_size, config, torch.float32, CPU, backend)
        for part in (made.keys, made.values):
            part[:, :num_blocks] = torch.nan
        return made

    check_random_steps(cache, 2e-5)
    calls = package.num_varlen if name == "flash_attn" else BatchPrefillWithPagedKVCacheWrapper.plan_count
    print(f"{calls} calls of {name}")
    assert calls > 0


@torch.inference_mode()
def check_random_steps(make_cache, limit: float):
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    compared, decodes, prefills, windows, crossed, worst = 0, 0, 0, 0, 0, 0.0
    for _ in range(8):
        config, block_size = random_config(rng), rng.choice([16, 32])
        cache = make_cache(config, 60, block_size)
        rotary = RotaryEmbedding(config, torch.device("cpu"))
        free = rng.sample(range(60), 60)
        sequences = []
        for length in [rng.randint(1, 3 * block_size) for _ in range(rng.randint(1, 6))]:
            heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
            q, k, v = (torch.randn(2, length, head, config.head_dim) for head in heads)
            qkv = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
            cos, sin = rotary.at(torch.arange(length))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            sequences.append(Sequence(qkv, q, k, v, [free.pop() for _ in range(-(-length // block_size))]))
        while left := [row for row in sequences if row.done < row.queries.shape[1]]:
            step = rng.sample(left, rng.randint(1, len(left)))
            sizes = [rng.choice([1, rng.randint(1, row.queries.shape[1] - row.done)]) for row in step]
            chunks = [
                ScheduledChunk([0] * size, row.done, row.table, 0)
                for row, size in zip(step, sizes, strict=True)
            ]
            attend = begin_step(cache, chunks)
            for layer in range(2):
                spans = [slice(row.done, row.done + size) for row, size in zip(step, sizes, strict=True)]
                parts = [row.qkv[layer, span] for row, span in zip(step, spans, strict=True)]
                out = attend(layer, torch.cat(parts), None, None)
                assert torch.isfinite(out).all()
                results = iter(out.unflatten(-1, (-1, config.head_dim)))
                window = config.window(layer)
                for row, span in zip(step, spans, strict=True):
                    for position in range(span.start, span.stop):
                        expected = reference(
                            row.queries[layer, position], row.keys[layer], row.values[layer], position, window
                        )
                        error = (next(results).double() - expected).abs() / (1 + expected.abs())
                        worst = max(worst, error.max().item())
                        compared += 1
                        crossed += position >= block_size
                        windows += window is not None and position >= window
            for row, size in zip(step, sizes, strict=True):
                row.done += size
                decodes += size == 1
                prefills += size > 1
    print(
        f"{compared} queries, the worst is off by {worst:.2e}; {decodes} decodes, {prefills} chunks, "
        f"{crossed} queries past the first block, {windows} past their window"
    )
    assert min(compared, decodes, prefills, crossed) > 0
    assert worst < limit
