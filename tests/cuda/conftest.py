"""What needs a GPU. `make test-cuda` runs it; without a GPU it fails, and is no part of `make test`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    return torch.device("cuda", torch.cuda.current_device())
