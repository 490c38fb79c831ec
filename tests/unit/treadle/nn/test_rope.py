"""Rotary angles against complex numbers in float64 and against transformers."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from treadle.models.config import parse_config
from treadle.nn.rope import RotaryEmbedding, rotate

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 256},
}


def configuration(scaling: str, theta: float):
    raw = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": SCALINGS[scaling] | {"rope_theta": theta},
    }
    return parse_config(raw | {"model_type": "llama"}), LlamaConfig(**raw)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_equal_transformers(scaling):
    theta = random.SystemRandom().choice([1e4, 1e5, 5e5])
    ours, theirs = configuration(scaling, theta)
    positions = torch.arange(4096)
    cos, sin = RotaryEmbedding(ours, torch.device("cpu")).at(positions)
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1, 1, 64), positions[None])
    assert cos.shape == (4096, 1, 16)
    for mine, other in zip((cos, sin), expected, strict=True):
        assert (mine[:, 0] - other[0, :, :16]).abs().max() < 2e-6 * 4096, theta


def test_rotation_is_multiplication_by_a_unit_number():
    config, _ = configuration("default", 1e4)
    positions = torch.tensor([0, 1, 77, 2048, 4095])
    x = torch.randn(5, 3, 32)
    cos, sin = RotaryEmbedding(config, torch.device("cpu")).at(positions)
    angles = positions.double()[:, None] * 1e4 ** (-torch.arange(0, 32, 2).double() / 32)
    turned = torch.complex(x[..., :16].double(), x[..., 16:].double()) * torch.exp(1j * angles)[:, None]
    result = rotate(x, cos, sin)
    assert (result - torch.cat((turned.real, turned.imag), -1)).abs().max() < 1e-3
    assert torch.equal(result[0], x[0])
    assert rotate(x.bfloat16(), cos, sin).dtype is torch.bfloat16


def test_a_position_has_the_same_bits_in_every_batch():
    config, _ = configuration("llama3", 1e4)
    rotary = RotaryEmbedding(config, torch.device("cpu"))
    positions = torch.randint(4096, (300,))
    x = torch.randn(300, 4, 32)
    whole = rotate(x, *rotary.at(positions))
    for rows in (1, 2, 3, 7, 64, 299):
        assert torch.equal(rotate(x[:rows], *rotary.at(positions[:rows])), whole[:rows])
