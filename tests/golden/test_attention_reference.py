"""Paged attention against a slow reference in float64, over random shapes, tables and chunks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from treadle.models.config import parse_config
from treadle_worker.batch import ScheduledChunk
from treadle_worker.kv_cache import KVCache
from treadle_worker.paged_attention import PagedAttention

CPU = torch.device("cpu")


@dataclass
class Sequence:
    """Random queries, keys and values of every layer: each [layers, tokens, heads, D]."""

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
    head_dim = rng.choice([8, 16, 20, 64])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_random_steps_equal_the_reference(dtype):
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    compared, decodes, prefills, windows, crossed, worst = 0, 0, 0, 0, 0, 0.0
    for _ in range(8):
        config, block_size = random_config(rng), rng.choice([16, 32])
        cache = KVCache(60, block_size, config, dtype, CPU)
        cache.keys.fill_(torch.nan)  # what an earlier owner left must not matter
        cache.values.fill_(torch.nan)
        free = rng.sample(range(60), 60)
        sequences = []
        for length in [rng.randint(1, 3 * block_size) for _ in range(rng.randint(1, 6))]:
            heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
            q, k, v = ((2 * torch.randn(2, length, head, config.head_dim)).to(dtype) for head in heads)
            sequences.append(Sequence(q, k, v, [free.pop() for _ in range(-(-length // block_size))]))
        while left := [row for row in sequences if row.done < row.queries.shape[1]]:
            step = rng.sample(left, rng.randint(1, len(left)))
            sizes = [rng.choice([1, rng.randint(1, row.queries.shape[1] - row.done)]) for row in step]
            chunks = [
                ScheduledChunk([0] * size, row.done, row.table, 0)
                for row, size in zip(step, sizes, strict=True)
            ]
            attend = PagedAttention(cache, config, chunks)
            for layer in range(2):
                spans = [slice(row.done, row.done + size) for row, size in zip(step, sizes, strict=True)]
                parts = [
                    (row.queries[layer, span], row.keys[layer, span], row.values[layer, span])
                    for row, span in zip(step, spans, strict=True)
                ]
                out = attend(layer, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
                results = iter(out)
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
    assert worst < (2e-5 if dtype is torch.float32 else 2**-8)
