"""An engine whose weights do not fit says so before it reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_folder import write_model

from treadle.models.config import read_config
from treadle.models.memory_estimate import weight_bytes
from treadle_worker import weight_room
from treadle_worker.config import EngineConfig
from treadle_worker.engine_loader import load_engine
from treadle_worker.engine_protocol import EngineStart

CPU = torch.device("cpu")


@pytest.mark.parametrize("quantization", ["", "int8", "int4"])
def test_what_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
):
    folder = write_model(tmp_path / "model")
    needed = weight_bytes(read_config(folder), "bfloat16", quantization)
    (folder / "model.safetensors").unlink()
    settings = EngineConfig(device="cpu", quantization=quantization, kernels="native").model_dump()
    monkeypatch.setattr(weight_room, "free_bytes", lambda device: needed - 1)
    with pytest.raises(MemoryError, match=rf"take {needed} bytes in bfloat16.* {needed - 1} are free on cpu"):
        load_engine(EngineStart(model_folder=str(folder), **settings))
    monkeypatch.setattr(weight_room, "free_bytes", lambda device: needed)
    weight_room.check_room(folder, "bfloat16", CPU, quantization=quantization, kernels="native")


def test_files_that_stay_mapped_need_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_room, "free_bytes", lambda device: 0)
    folder = write_model(tmp_path / "model")
    weight_room.check_room(folder, "bfloat16", CPU, quantization="", kernels="torch")
    with pytest.raises(MemoryError):
        weight_room.check_room(folder, "bfloat16", torch.device("cuda"), quantization="", kernels="torch")
