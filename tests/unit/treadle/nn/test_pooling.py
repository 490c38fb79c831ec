"""Pooling against sentence-transformers' definitions, in float64 by numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from treadle.nn.pooling import Pooling, embed, pool

WIDTH = 48


def exact(rows: NDArray[np.float64], first: int, pooling: Pooling) -> NDArray[np.float64]:
    """One text's vector. A prompt's tokens are masked; the first token is one of it, or the text's."""
    if pooling == "cls":
        return rows[0]
    if pooling == "last":
        return rows[-1]
    mask = np.arange(len(rows)) >= first
    return (rows * mask[:, None]).sum(0) / max(mask.sum(), 1e-9)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_every_pooling(pooling: Pooling, rng: random.Random):
    torch.manual_seed(rng.randrange(1 << 31))
    lengths = [1, 512, *(rng.randint(1, 200) for _ in range(30))]
    firsts = [rng.choice([0, rng.randrange(length), length - 1]) for length in lengths]
    hidden_TE = torch.randn(sum(lengths), WIDTH) + 0.5
    pooled_NE = pool(hidden_TE, lengths, firsts, pooling)
    assert pooled_NE.dtype is torch.float32
    wide = np.split(hidden_TE.double().numpy(), np.cumsum(lengths)[:-1])
    expected = np.stack([exact(rows, first, pooling) for rows, first in zip(wide, firsts, strict=True)])
    worst = float(np.abs(pooled_NE.numpy() - expected).max())
    print(f"{pooling}: {len(lengths)} texts, off by {worst:.1e} at most")
    assert worst < 1e-6
    for dimensions, normalize in ((0, False), (0, True), (7, False), (7, True), (WIDTH, True)):
        cut = expected[:, : dimensions or WIDTH]
        if normalize:
            cut = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        ours = embed(pooled_NE, dimensions, normalize)
        assert ours.shape == cut.shape
        np.testing.assert_allclose(ours.numpy(), cut, atol=2e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_gets_the_same_bits_in_any_batch(pooling: Pooling, rng: random.Random):
    torch.manual_seed(rng.randrange(1 << 31))
    lengths = [rng.randint(1, 300) for _ in range(20)]
    firsts = [rng.randrange(length) for length in lengths]
    texts = [torch.randn(length, WIDTH) for length in lengths]
    compared = 0
    for _ in range(5):
        order = rng.sample(range(20), rng.randint(1, 20))
        batch = torch.cat([texts[i] for i in order])
        vectors = pool(batch, [lengths[i] for i in order], [firsts[i] for i in order], pooling)
        for vector, i in zip(embed(vectors, 0, True), order, strict=True):
            alone = embed(pool(texts[i], [lengths[i]], [firsts[i]], pooling), 0, True)[0]
            assert torch.equal(vector, alone)
            compared += 1
    print(f"{pooling}: {compared} vectors equal in all bits")
    assert compared >= 5


def test_nothing_to_pool_is_a_vector_of_zeros():
    vectors = embed(pool(torch.ones(5, 4), [2, 3], [2, 0], "mean"), 0, True)
    assert vectors.tolist() == [[0.0] * 4, [0.5] * 4]
