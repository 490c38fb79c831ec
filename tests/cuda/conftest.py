"""What needs a GPU. `make test-cuda` runs it; without a GPU it fails, and is no part of `make test`."""

from __future__ import annotations

import random

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return random.Random(seed)
