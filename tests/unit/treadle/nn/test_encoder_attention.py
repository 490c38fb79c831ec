"""Attention inside texts in torch; its values are compared in tests/golden/test_encoders.py."""

from __future__ import annotations

import random

import torch

from treadle.nn.encoder_attention import TorchTextAttention

CPU = torch.device("cpu")


def test_a_query_that_is_no_number_has_no_number_for_its_answer(rng: random.Random):
    """However few keys there are: an answer that is wrong must be seen to be."""
    torch.manual_seed(rng.randrange(1 << 31))
    heads, dim = 3, 20
    lengths = [1, 2, 7, 15, 16, 17, 40, 7]
    attend = TorchTextAttention(lengths, heads, CPU)
    qkv_TX = torch.randn(sum(lengths), 3 * heads * dim)
    sound_TE = attend(qkv_TX)
    assert torch.isfinite(sound_TE).all()
    found, start = 0, 0
    for length in lengths:
        row, head = start + rng.randrange(length), rng.randrange(heads)
        bad_TX = qkv_TX.clone()
        bad_TX[row, head * dim + rng.randrange(dim)] = torch.nan
        out_TE = attend(bad_TX)
        assert torch.isnan(out_TE[row]).any(), length
        others = torch.arange(len(out_TE)) != row
        assert torch.equal(out_TE[others], sound_TE[others])
        found += 1
        start += length
    print(f"{found} queries that are NaN seen in their rows alone")
    assert found == len(lengths)
