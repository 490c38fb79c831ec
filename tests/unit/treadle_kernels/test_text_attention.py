"""Attention inside texts on every instruction set that this CPU has, against float64."""

from __future__ import annotations

import random

import pytest
import torch
import treadle_kernels as native
from torch import Tensor

from treadle.nn.native import NativeTextAttention


def exact(qkv_TX: Tensor, lengths: list[int], heads: int) -> Tensor:
    """The same in float64, text by text."""
    outs = []
    for rows in qkv_TX.double().split(lengths):
        q, k, v = rows.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        outs.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


@pytest.mark.parametrize(("heads", "dim"), [(12, 32), (3, 64), (2, 16), (1, 48)])
def test_levels_and_threads_equal_float64_and_each_other(heads: int, dim: int, rng: random.Random):
    """One long text alone has its queries shared out; scores far apart, as trained models have them."""
    torch.manual_seed(rng.randrange(1 << 31))
    before = native.level()
    batches = [[700], [1], [31, 32, 33, 1, 64, 65], [rng.randint(1, 300) for _ in range(9)]]
    compared, worst = 0, 0.0
    try:
        for lengths in batches:
            qkv_TX = 1.5 * torch.randn(sum(lengths), 3 * heads * dim)
            expected = exact(qkv_TX, lengths, heads)
            for level in native.levels():
                native.set_level(level)
                attention = NativeTextAttention(lengths, heads)
                whole = attention(qkv_TX)
                off = float((whole - expected).abs().max())
                worst = max(worst, off)
                assert off < 2e-5, (level, lengths)
                for attention._threads in (1, 3, 4):
                    assert torch.equal(attention(qkv_TX), whole), (level, lengths)
                start = 0
                for length in lengths:
                    rows = slice(start, start + length)
                    alone = NativeTextAttention([length], heads)(qkv_TX[rows])
                    assert torch.equal(alone, whole[rows]), (level, lengths, start)
                    start += length
                    compared += 1
    finally:
        native.set_level(before)
    print(f"{heads} heads of {dim}: {compared} texts equal bitwise; off float64 by {worst:.1e} at most")
    assert compared >= 17


def test_a_number_that_is_none_stays_in_its_text(rng: random.Random):
    torch.manual_seed(rng.randrange(1 << 31))
    lengths = [5, 40, 70]
    qkv_TX = torch.randn(115, 3 * 2 * 32)
    sound = NativeTextAttention(lengths, 2)(qkv_TX)
    qkv_TX[20] = torch.nan
    out = NativeTextAttention(lengths, 2)(qkv_TX)
    assert torch.isnan(out[5:45]).all()
    assert torch.equal(out[:5], sound[:5])
    assert torch.equal(out[45:], sound[45:])
