"""What an engine holds of its device's memory: figures, and letting go of it.

On a CPU the figures are 0: there the engine's process has its own (`resident_memory`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from treadle_worker.engine_protocol import DeviceMemory

READ_EVERY_S = 1.0


def use(device: torch.device) -> None:
    """Makes a numbered CUDA device this thread's own: what is allocated for it must not touch another."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def read_memory(device: torch.device) -> DeviceMemory:
    """Of this process, on the device."""
    if device.type != "cuda":
        return DeviceMemory()
    stats = torch.cuda.memory_stats(device)
    return DeviceMemory(
        allocated_bytes=stats.get("allocated_bytes.all.current", 0),
        reserved_bytes=stats.get("reserved_bytes.all.current", 0),
        peak_bytes=stats.get("allocated_bytes.all.peak", 0),
        total_bytes=torch.cuda.mem_get_info(device)[1],
    )


class MemoryWatch:
    """The figures, read at most once a second: torch takes some 0.1 ms to put them together."""

    def __init__(
        self,
        device: torch.device,
        *,
        read: Callable[[torch.device], DeviceMemory] = read_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._read, self._clock = device, read, clock
        self._seen, self._seen_at = read(device), clock()

    def __call__(self) -> DeviceMemory:
        """What was read last."""
        if (now := self._clock()) - self._seen_at >= READ_EVERY_S:
            self._seen, self._seen_at = self._read(self._device), now
        return self._seen


def release(device: torch.device) -> None:
    """Gives back what nothing refers to any more, and what cuBLAS keeps for each stream."""
    gc.collect()
    if device.type == "cuda":
        drop_workspaces(device)
        torch.cuda.empty_cache()


def drop_workspaces(device: torch.device) -> None:
    """Frees what cuBLAS keeps for each stream that it was called on; it takes it anew where it needs it."""
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
