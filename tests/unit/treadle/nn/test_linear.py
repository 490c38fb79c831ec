"""Rows keep their bits whatever the number of rows, and say what float64 says."""

from __future__ import annotations

import random

import pytest
import torch

from treadle.nn.linear import Linear, RMSNorm, silu, warm_up

SIZES = [*range(1, 40), 63, 64, 65, 97, 128, 200, 255, 256, 257]


def layer(
    inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool, prepare: bool
) -> tuple[Linear, Linear]:
    """A random layer, as served, and a plain one in float64 with the same weights."""
    served, exact = Linear(inputs, outputs, bias=bias), Linear(inputs, outputs, bias=bias)
    # Sizes over many orders of magnitude, for a form that scales.
    state = {"weight": torch.randn(outputs, inputs) * 10.0 ** torch.randint(-6, 2, (outputs, 1))}
    if bias:
        state["bias"] = torch.randn(outputs)
    state = {name: value.to(dtype) for name, value in state.items()}
    served.load_state_dict(state, assign=True)
    exact.load_state_dict({name: value.double() for name, value in state.items()}, assign=True)
    if prepare:
        served.prepare()
    return served, exact


@pytest.mark.parametrize("prepare", [True, False], ids=["prepared", "plain"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@torch.inference_mode()
def test_rows_are_alike_in_every_batch_and_right(dtype, bias, prepare):
    if dtype is torch.float16 and not prepare:
        dtype = torch.float32  # a plain float16 product on a CPU promises nothing
    seed = random.SystemRandom().randrange(1 << 31)
    torch.manual_seed(seed)
    compared = 0
    for inputs, outputs in ((48, 97), (64, 32), (96, 160), (129, 64), (1536, 576), (4096, 128)):
        served, exact = layer(inputs, outputs, dtype, bias=bias, prepare=prepare)
        x = torch.randn(257, inputs).to(dtype)
        whole = served(x)
        assert whole.dtype is dtype
        for rows in SIZES:
            start = random.Random(seed + rows).randrange(258 - rows)
            assert torch.equal(served(x[start : start + rows]), whole[start : start + rows]), (seed, rows)
            compared += rows
        # Where few rows are added in another order, one sum in some hundred thousand is another one.
        for rows in (1, 2, 3):
            pieces = torch.cat([served(piece) for piece in x.split(rows)])
            assert torch.equal(pieces, whole), (seed, rows)
            compared += len(pieces)
        expected = exact(x.double())
        # Float32 sums, one rounding to the dtype, which has only so many small numbers, and what packing
        # may do to weights that are tiny beside the largest.
        sums = 2e-6 * (x.double().abs() @ exact.weight.abs().T + expected.abs())
        rounding = torch.finfo(dtype).eps * (expected.abs() + torch.finfo(dtype).tiny)
        packing = 2**-40 * exact.weight.abs().max() * x.double().abs().sum(-1, keepdim=True)
        assert ((whole.double() - expected).abs() <= sums + rounding + packing).all(), seed
    print(f"seed {seed}: {compared} rows equal bitwise")


@torch.inference_mode()
def test_a_layer_of_zeros_and_no_rows_at_all():
    for dtype in (torch.bfloat16, torch.float32):
        zeros = Linear(48, 16)
        zeros.load_state_dict({"weight": torch.zeros(16, 48, dtype=dtype)}, assign=True)
        zeros.prepare()
        assert torch.equal(zeros(torch.ones(3, 48, dtype=dtype)), torch.zeros(3, 16, dtype=dtype))
        assert zeros(torch.ones(0, 48, dtype=dtype)).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.inference_mode()
def test_norm_and_silu(dtype):
    seed = random.SystemRandom().randrange(1 << 31)
    torch.manual_seed(seed)
    for width in (48, 100, 576):
        norm = RMSNorm(width, 1e-5)
        norm.load_state_dict({"weight": torch.randn(width).to(dtype)}, assign=True)
        x = (torch.randn(257, width) * 4).to(dtype)
        wide = x.double()
        normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
        for function, expected in ((norm, normed), (silu, wide * wide.sigmoid())):
            whole = function(x)
            error = (whole.double() - expected).abs() / (expected.abs() + 1e-3)
            assert error.max() < 4 * torch.finfo(dtype).eps, seed
            for rows in SIZES:
                start = random.Random(seed + rows).randrange(258 - rows)
                assert torch.equal(function(x[start : start + rows]), whole[start : start + rows]), (
                    seed,
                    rows,
                )


@torch.inference_mode()
def test_half_types_are_multiplied_in_few_sizes(monkeypatch):
    """What the library keeps for each size that it sees is bounded."""
    sizes = []

    def linear(x_TI, *weights):
        sizes.append(len(x_TI))
        return product(x_TI, *weights)

    product = torch.nn.functional.linear
    monkeypatch.setattr("treadle.nn.linear.F.linear", linear)
    served, _ = layer(16, 8, torch.bfloat16, bias=False, prepare=False)
    for rows in range(1, 1025):
        assert len(served(torch.ones(rows, 16, dtype=torch.bfloat16))) == rows
        assert rows <= sizes[-1] < rows + 256
        assert rows > 256 or sizes[-1] < rows + 32
    assert len(sizes) == 1024
    print(f"{len(set(sizes))} sizes for 1 to 1024 rows: {sorted(set(sizes))}")
    assert len(set(sizes)) < 20


@torch.inference_mode()
def test_every_size_is_met_before_the_first_request(monkeypatch):
    met = set()

    def linear(x_TI, weight_OI, *bias):
        met.add((len(x_TI), tuple(weight_OI.shape)))
        return product(x_TI, weight_OI, *bias)

    product = torch.nn.functional.linear
    monkeypatch.setattr("treadle.nn.linear.F.linear", linear)
    layers = [
        layer(*shape, torch.bfloat16, bias=False, prepare=False)[0] for shape in ((16, 8), (8, 16), (16, 8))
    ]
    warm_up(torch.nn.ModuleList(layers), 300)
    warm = set(met)
    for one in layers:
        for rows in range(1, 301):
            one(torch.ones(rows, one.weight.shape[1], dtype=torch.bfloat16))
    assert met == warm
    assert len(warm) == 2 * 16
    met.clear()
    warm_up(torch.nn.ModuleList([layer(16, 8, torch.float32, bias=False, prepare=False)[0]]), 300)
    assert not met, "float32 products keep nothing"
