"""Makes the blocks beside this file with ggml, out of the `xllamacpp` wheel's library.

    python tests/data/gguf_blocks/make.py

A format's `<name>.blocks` are 2,048 values as ggml quantised them (scales, outliers, a block of zeros,
one of a single sign, one of tiny values), then blocks for 1,024 values of random bytes, so that every bit
of every field is used. `<name>.float32` is what ggml's own `dequantize_row_*` makes of them, little-endian.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
FORMATS = {
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
"""ggml's number, values a block, bytes a block."""

_QUANTIZED, _RANDOM = 2048, 1024


def values(random: np.random.Generator) -> np.ndarray:
    """What weights look like, and what they must not break on."""
    rows = random.standard_normal((8, 256)).astype(np.float32)
    rows *= np.float32(10.0) ** random.uniform(-3, 1, (8, 1)).astype(np.float32)
    rows[1, ::37] *= 40
    rows[2] = 0
    rows[3] = abs(rows[3])
    rows[4] = -abs(rows[4])
    rows[5] *= np.float32(1e-6)
    return rows.reshape(-1)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def main() -> None:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (library,) = Path(spec.submodule_search_locations[0]).glob("*.so")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    random = np.random.default_rng(20240229)
    for name, (number, per_block, block_bytes) in FORMATS.items():
        source = values(random)
        quantized = np.zeros(_QUANTIZED // per_block * block_bytes, dtype=np.uint8)
        written = ggml.ggml_quantize_chunk(
            number,
            pointer(source),
            pointer(quantized),
            ctypes.c_int64(0),
            ctypes.c_int64(1),
            ctypes.c_int64(_QUANTIZED),
            None,
        )
        assert written == len(quantized), (name, written, len(quantized))
        noise = random.integers(0, 256, _RANDOM // per_block * block_bytes, dtype=np.uint8)
        blocks = np.concatenate([quantized, noise])
        expected = np.zeros(_QUANTIZED + _RANDOM, dtype=np.float32)
        dequantize = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}.get(
            name, f"dequantize_row_q{name[1:]}"
        )
        getattr(ggml, dequantize)(pointer(blocks), pointer(expected), ctypes.c_int64(len(expected)))
        (FOLDER / f"{name}.blocks").write_bytes(blocks.tobytes())
        (FOLDER / f"{name}.float32").write_bytes(expected.tobytes())
        error = np.abs(expected[:_QUANTIZED] - source).mean() / np.abs(source).mean()
        print(f"{name}: {len(blocks)} bytes, mean error {error:.5f} of the mean value")


if __name__ == "__main__":
    main()
