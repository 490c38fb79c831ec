"""The native products on every instruction set that this CPU has: right, and each row its own."""

from __future__ import annotations

import random

import pytest
import torch
import treadle_kernels as native
from treadle_kernels import Kind, PackedWeight, Program, Prologue

from treadle.models.quantization_config import group_size
from treadle.nn.native import pack_quantized
from treadle.nn.quantization import QuantizedLinear, quantize

SHAPES = [(16, 8), (64, 96), (72, 50), (576, 960), (100, 36), (1536, 577)]
ROWS = [1, 2, 3, 7, 12, 13, 31, 65]
EPSILON = 1e-5


@pytest.fixture(params=native.levels())
def level(request):
    before = native.level()
    native.set_level(request.param)
    yield request.param
    native.set_level(before)


@pytest.fixture
def rng(rng: random.Random) -> random.Random:
    """For torch's chances, too."""
    torch.manual_seed(rng.randrange(1 << 31))
    return rng


def pack(weight: torch.Tensor, bias: torch.Tensor | None, kind: Kind) -> PackedWeight:
    group = group_size(kind.name.lower(), weight.shape[1])
    source = Kind.FLOAT32 if weight.dtype is torch.float32 else Kind.BFLOAT16
    address = None if bias is None else bias.data_ptr()
    return PackedWeight(
        weight.data_ptr(), source, *weight.shape, bias=address, kind=kind, group_size=group, threads=2
    )


def multiply(packed: PackedWeight, x: torch.Tensor, threads: int, **prologue) -> torch.Tensor:
    residual = prologue.pop("residual", None)
    x, y = x.contiguous(), torch.full((len(x), packed.out_features), torch.nan)
    if residual is not None:
        y = residual.clone()
        prologue["residual"] = y.data_ptr()
    Program([packed.call(x.data_ptr(), y.data_ptr(), **prologue)]).run(len(x), threads)
    return y


def unpacked(packed: PackedWeight) -> torch.Tensor:
    weight = torch.empty(packed.out_features, packed.in_features)
    packed.unpack(weight.data_ptr())
    return weight


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_products_with_everything_around_them(level, kind, rng):
    compared, worst = 0, 0.0
    for inputs, outputs in SHAPES:
        rows = rng.choice(ROWS)
        weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
        norm_weight, residual = torch.rand(inputs) + 0.5, torch.randn(rows, outputs)
        packed = pack(weight, bias, kind)
        exact = unpacked(packed).double()
        x, gated = torch.randn(rows, inputs), torch.randn(rows, 2 * inputs)
        norm = {"prologue": Prologue.RMS_NORM, "norm_weight": norm_weight.data_ptr(), "epsilon": EPSILON}
        wide, gates, values = x.double(), gated[:, :inputs].double(), gated[:, inputs:].double()
        normed = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * norm_weight
        cases = [
            (x, {}, wide, 0.0),
            (x, norm, normed, 0.0),
            (gated, {"prologue": Prologue.SILU_GATE}, gates * gates.sigmoid() * values, 0.0),
            (x, norm | {"residual": residual}, normed, residual.double()),
        ]
        for given, arguments, prologued, added in cases:
            whole = multiply(packed, given, 2, **arguments)
            expected = prologued @ exact.T + bias + added
            # Half of the last bit of each input, all in one direction at the worst; most cancel.
            error = (whole - expected).abs().max() / (prologued.abs().amax() * exact.norm(dim=1).max())
            worst = max(worst, error.item())
            for _ in range(3):
                count = rng.randint(1, rows)
                start = rng.randrange(rows - count + 1)
                part = slice(start, start + count)
                mine = arguments | ({"residual": residual[part]} if "residual" in arguments else {})
                assert torch.equal(multiply(packed, given[part], rng.choice([1, 2]), **mine), whole[part])
                compared += count
    print(f"{level}, {kind.name}: off by {worst:.1e} at most; {compared} rows equal bitwise")
    assert worst < {Kind.FLOAT32: 2e-6, Kind.BFLOAT16: 5e-3}.get(kind, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_products_are_those_of_the_torch_fallback(level, quantization, dtype, rng):
    kind = Kind[quantization.upper()]
    total, worst = 0, 0.0
    for inputs, outputs in SHAPES:
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
        weight *= 10.0 ** torch.randint(-3, 3, (outputs, 1))
        packed, quantized = pack(weight, bias, kind), quantize(weight, quantization)
        assert torch.equal(unpacked(packed), quantized.dequantized())
        total += weight.numel()
        x = torch.randn(9, inputs)
        native_y = multiply(packed, x, 2)
        torch_y = QuantizedLinear(quantized, bias)(x, None, False, None)
        scale = torch_y.abs().amax(0) + 1e-6
        worst = max(worst, ((native_y - torch_y).abs() / scale).max().item())
    print(f"{level}: all of {total} weights are the same; products off by {worst:.1e} at most")
    assert worst < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_hard_weights_are_rounded_alike(quantization, dtype, rng):
    """Groups of zeros, of one value, of values at both ends of what floats have, cut off anywhere."""
    compared = 0
    for _ in range(60):
        inputs, outputs = rng.randint(1, 200), rng.randint(1, 40)
        weight = torch.randn(outputs, inputs) * 10.0 ** torch.randint(-44, 30, (outputs, 1))
        for row in range(outputs):
            first, last = sorted(rng.sample(range(inputs + 1), 2))
            weight[row, first:last] = rng.choice([0.0, -0.0, 1.5, -3e-39, 1e-45, weight[row, 0].item()])
        weight = weight.to(dtype)
        packed = pack(weight.contiguous(), None, Kind[quantization.upper()])
        assert torch.equal(unpacked(packed), quantize(weight, quantization).dequantized())
        compared += weight.numel()
    print(f"{compared} weights are the same")
    assert compared > 10_000


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_that_were_quantised_before_are_packed_as_they_are(level, quantization, rng):
    compared = 0
    for inputs, outputs in SHAPES:
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        at_load = pack(weight, bias, Kind[quantization.upper()])
        before = pack_quantized(quantize(weight, quantization), bias).packed
        assert before.nbytes == at_load.nbytes
        assert torch.equal(unpacked(before), unpacked(at_load))
        x = torch.randn(rng.choice(ROWS), inputs)
        assert torch.equal(multiply(before, x, 2), multiply(at_load, x, 2))
        compared += x.shape[0] * outputs
    print(f"{level}: {compared} results are bitwise the same")
    assert compared >= sum(outputs for _, outputs in SHAPES)


def test_quantised_weights_are_near(rng):
    for kind, most in ((Kind.INT8, 0.012), (Kind.INT4, 0.09)):
        weight = torch.randn(64, 576)
        off = (unpacked(pack(weight, None, kind)) - weight).norm() / weight.norm()
        print(f"{kind.name}: off by {off:.4f}")
        assert 0 < off < most
    exact = torch.randint(0, 16, (32, 64)).float()
    exact[:, ::32], exact[:, 1::32] = 0, 15
    assert torch.equal(unpacked(pack(exact, None, Kind.INT4)), exact), "16 values a group are exact"


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_what_is_not_finite_comes_out_in_its_own_row(level, kind):
    packed = pack(torch.randn(40, 48), None, kind)
    x = torch.randn(6, 48)
    sound = multiply(packed, x, 2)
    x[1, 3], x[4, 7] = torch.nan, torch.inf
    spoilt = multiply(packed, x, 2)
    assert not torch.isfinite(spoilt[[1, 4]]).any()
    assert torch.equal(spoilt[[0, 2, 3, 5]], sound[[0, 2, 3, 5]])


def test_levels():
    assert native.levels()[-1] == "generic"
    assert native.level() in native.levels()
    with pytest.raises(ValueError, match="mmx"):
        native.set_level("mmx")
    with pytest.raises(ValueError, match="multiple of 16"):
        PackedWeight(0, Kind.FLOAT32, 8, 8, kind=Kind.INT4, group_size=8)
    print(native.levels())
