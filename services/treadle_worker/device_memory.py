"""How much memory there is to take, on the CPU and on accelerators."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be taken: on a CPU within the container's limit, where there is one."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    free = psutil.virtual_memory().available
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used + _reclaimable()))
    return free


def share_bytes(device: torch.device, percent: float) -> int:
    """What may still be taken of that share: on CUDA of all of the device's memory, of which this process has
    some already; elsewhere of what is free."""
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
        return int(total * percent / 100) - torch.cuda.memory_allocated(device)
    return int(free_bytes(device) * percent / 100)


def _reclaimable() -> int:
    """Of what the container uses, the pages of files that nobody has touched for a while."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        return None
