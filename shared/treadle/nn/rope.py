"""Rotary position embedding (Su et al., 2021), with the scalings that the Llama family uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from treadle.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Float32 [head_dim / 2], in radians a token.

    "llama3" after the reference code of Llama 3.1: wavelengths shorter than `original / high_freq_factor`
    stay, those longer than `original / low_freq_factor` are stretched by `factor`, and between the two
    the share of each changes linearly with `original / wavelength`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        rotations = scaling.original_max_position_embeddings / wavelengths
        kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return frequencies


class RotaryEmbedding:
    """Cosines and sines of every position, float32 [positions, head_dim / 2], computed once.

    Rows are looked up, never recomputed: a position has the same bits in every batch.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(config)
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [positions, head_dim / 2]."""
        return self._cos, self._sin

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, head_dim / 2] of these positions."""
        return self._cos[positions_T].unsqueeze(1), self._sin[positions_T].unsqueeze(1)


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) of a head by its position's angle, in float32, as the angles are."""
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)
