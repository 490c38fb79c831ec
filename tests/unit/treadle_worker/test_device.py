"""Which device an engine takes."""

from __future__ import annotations

import logging

import pytest
import torch

from treadle_worker.engine_loader import choose_device


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many CUDA devices, with mps or without."""

    def has(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return has


@pytest.mark.parametrize(
    ("cuda", "mps", "asked", "given"),
    [
        (2, False, "auto", "cuda"),
        (0, True, "auto", "mps"),
        (0, False, "auto", "cpu"),
        (2, False, "cuda", "cuda"),
        (2, False, "cuda:1", "cuda:1"),
        (0, True, "mps", "mps"),
        (2, True, "cpu", "cpu"),
    ],
)
def test_what_is_there_is_taken(machine, caplog, cuda, mps, asked, given):
    machine(cuda, mps)
    assert choose_device(asked) == torch.device(given)
    assert not caplog.records


@pytest.mark.parametrize(("cuda", "asked"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (2, "mps")])
def test_what_is_not_there_is_the_cpu_with_a_warning(machine, caplog, cuda, asked):
    machine(cuda, mps=False)
    assert choose_device(asked) == torch.device("cpu")
    (record,) = caplog.records
    assert (record.levelno, record.device) == (logging.WARNING, asked)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:-1", "meta"])
def test_what_is_no_device_is_refused(machine, name):
    machine(1, mps=False)
    with pytest.raises((RuntimeError, ValueError)):
        choose_device(name)
