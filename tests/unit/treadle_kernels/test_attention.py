"""The native attention on every instruction set that this CPU has.

That it is right is for tests/golden/test_attention_reference.py; here one level is held against the other,
and long contexts against themselves, shared out among threads or not.
"""

from __future__ import annotations

import random

import pytest
import torch
import treadle_kernels as native

from treadle.models.config import ModelConfig
from treadle_worker.batch import ScheduledChunk
from treadle_worker.native_attention import NativeAttention, NativeKVCache

CPU = torch.device("cpu")
BLOCKS = 64
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=48,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_windows=(None,),
)


def attend(dtype: torch.dtype, lengths: list[int], chunk: int, threads: int, seed: int) -> list[torch.Tensor]:
    """Whole sequences in chunks, by a fresh cache in a random order of blocks."""
    torch.manual_seed(seed)
    rows = [torch.randn(length, (6 + 2 * 2) * 48) for length in lengths]
    cache = NativeKVCache(BLOCKS, 32, CONFIG, dtype, CPU)
    cache.threads = threads
    free = random.sample(range(BLOCKS), BLOCKS)
    tables = [[free.pop() for _ in range(-(-length // 32))] for length in lengths]
    outs: list[list[torch.Tensor]] = [[] for _ in rows]
    for start in range(0, max(lengths), chunk):
        live = [i for i, length in enumerate(lengths) if start < length]
        parts = [rows[i][start : start + chunk] for i in live]
        chunks = [
            ScheduledChunk([0] * len(part), start, tables[i], 0) for i, part in zip(live, parts, strict=True)
        ]
        out = NativeAttention(cache, chunks)(0, torch.cat(parts), None, None)
        for i, piece in zip(live, out.split([len(part) for part in parts]), strict=True):
            outs[i].append(piece)
    return [torch.cat(pieces) for pieces in outs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_levels_threads_and_chunks(dtype):
    """1,300 keys are three partitions; one sequence alone has them shared out among the threads."""
    seed = random.SystemRandom().randrange(1 << 31)
    before, by_level = native.level(), {}
    compared = 0
    try:
        for level in native.levels():
            native.set_level(level)
            whole = attend(dtype, [1300, 40], 1300, 1, seed)
            for threads, chunk in ((2, 1300), (2, 257), (3, 500)):
                for one, other in zip(whole, attend(dtype, [1300, 40], chunk, threads, seed), strict=True):
                    assert torch.equal(one, other), (level, threads, chunk, seed)
                    compared += len(one)
            last = attend(dtype, [1300], 1299, 2, seed)[0]
            alone = attend(dtype, [1300], 1299, 1, seed)[0]
            assert torch.equal(last, alone)
            by_level[level] = whole
    finally:
        native.set_level(before)
    worst = 0.0
    for level, outs in by_level.items():
        for one, other in zip(outs, by_level["generic"], strict=True):
            off = (one - other).abs().max().item()
            worst = max(worst, off)
            assert off < (1e-5 if dtype is torch.float32 else 2e-2), level
    print(f"{list(by_level)}: {compared} rows equal bitwise; levels differ by {worst:.1e} at most")
