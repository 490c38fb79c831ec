"""Llama 3's stretched rotary frequencies, found again from the factors that a GGUF file has.

GGUF keeps what the parameters came to (one divisor a frequency) and not the parameters themselves.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ORIGINAL_LENGTHS = (8192, 4096, 2048, 16384, 32768)
_BANDS = ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0))


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> NDArray[np.float64]:
    """The divisor of each of the `head_dim // 2` frequencies.

    As transformers' `_compute_llama3_parameters`: wavelengths up to original/high stay, from original/low
    on they are divided by `factor`, and between the two the frequencies are blended.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: NDArray[np.float64] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors


def llama3_scaling(factors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json that makes these factors; None where they change nothing.

    Raises ValueError where no known parameters make them.
    """
    if factors.shape != (head_dim // 2,):
        raise ValueError(f"has {factors.size} factors where a head of {head_dim} needs {head_dim // 2}")
    if np.all(factors == 1.0):
        return None
    largest = float(factors.max()) if np.all(np.isfinite(factors)) else 0.0
    for original, (low, high) in itertools.product(_ORIGINAL_LENGTHS, _BANDS):
        if largest <= 1.0:
            break
        made = llama3_factors(theta, head_dim, largest, low, high, original)
        if np.allclose(made, factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": float(str(np.float32(largest))),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError("has factors that are not those of Llama 3's scaling; import the Hugging Face folder")
