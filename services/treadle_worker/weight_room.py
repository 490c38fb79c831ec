"""Whether a model's weights fit, by the registry's own estimate: asked before any of them is read."""

from __future__ import annotations

from pathlib import Path

import torch

from treadle.models.families import read_any_config
from treadle.models.memory_estimate import weight_bytes
from treadle.nn.execution import Kernels, Quantization, uses_native
from treadle_worker.device_memory import free_bytes


def check_room(
    folder: Path, dtype: str, device: torch.device, *, quantization: Quantization, kernels: Kernels
) -> None:
    """Raises MemoryError, with figures and the way out, where they do not; what `read_any_config` raises."""
    config = read_any_config(folder)
    # What is stored as MXFP4 becomes floats.
    quantization = quantization or (config.quantization if config.quantization != "mxfp4" else "")
    is_packed = bool(quantization) or uses_native(getattr(torch, dtype), device, kernels)
    if device.type == "cpu" and not is_packed:
        # The files stay mapped, and their pages come and go.
        return
    needed, free = weight_bytes(config, dtype, quantization), free_bytes(device)
    if needed > free:
        what = f"{dtype}, {quantization}" if quantization else dtype
        raise MemoryError(
            f"the weights take {needed} bytes in {what}, and {free} are free on {device}: serve a "
            "smaller form of the model (quantization int8 or int4, a narrower dtype), or free some memory"
        )
