"""Every block format against what ggml itself made and made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from treadle.models.bfloat16 import round_to_bfloat16
from treadle_registry.formats.gguf_blocks import dequantize
from treadle_registry.formats.gguf_reader import BLOCKS

FOLDER = Path(__file__).parents[3] / "data" / "gguf_blocks"
FORMATS = [name for name, _, _ in BLOCKS.values() if name != "F32"]


def test_every_format_has_blocks():
    assert sorted(path.stem for path in FOLDER.glob("*.blocks")) == sorted(FORMATS)
    assert len(FORMATS) == 12


@pytest.mark.parametrize("form", FORMATS)
def test_blocks_of_ggml(form: str):
    blocks = (FOLDER / f"{form}.blocks").read_bytes()
    expected = np.frombuffer((FOLDER / f"{form}.float32").read_bytes(), dtype="<f4")
    values = np.concatenate(list(dequantize(memoryview(blocks), form)))
    assert len(values) == len(expected) == 3072
    finite = np.isfinite(expected)
    assert finite[:2048].all()
    assert np.count_nonzero(expected[finite]) > 1500
    assert np.array_equal(np.isnan(values), np.isnan(expected))
    np.testing.assert_array_equal(values[:2048], expected[:2048])
    np.testing.assert_array_equal(values, expected)
    print(f"{form}: {len(values)} values equal ggml's, {np.count_nonzero(finite)} of them finite")


def test_slices_are_the_whole(monkeypatch: pytest.MonkeyPatch):
    blocks = memoryview((FOLDER / "Q4_K.blocks").read_bytes())
    whole = np.concatenate(list(dequantize(blocks, "Q4_K")))
    monkeypatch.setattr("treadle_registry.formats.gguf_blocks._ELEMENTS", 512)
    slices = list(dequantize(blocks, "Q4_K"))
    assert len(slices) == 6
    np.testing.assert_array_equal(np.concatenate(slices), whole)


def test_bfloat16_rounds_as_torch_does():
    import torch

    random = np.random.default_rng()
    bits = random.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    # Ties, carries into the exponent, the largest finite values, infinities and NaN.
    edges = np.array(
        [0, 0x8000, 0x18000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 1],
        dtype=np.uint32,
    )
    values = np.concatenate([bits, bits & 0xFFFF0000 | 0x8000, edges]).astype(np.uint32).view(np.float32)
    ours = torch.from_numpy(round_to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    nan = torch.isnan(theirs)
    assert 0 < int(nan.sum()) < len(values)
    assert torch.equal(torch.isnan(ours), nan)
    assert torch.equal(ours[~nan].view(torch.int16), theirs[~nan].view(torch.int16))
    print(f"{len(values)} values rounded as torch rounds them")
