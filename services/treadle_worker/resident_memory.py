"""How much memory a process holds."""

from __future__ import annotations

import psutil


def resident_bytes(process_id: int) -> int:
    """The process's resident memory; 0 where it is gone."""
    try:
        return int(psutil.Process(process_id).memory_info().rss)
    except psutil.Error:
        return 0
