"""A piece of work that one process at a time does, known by a name; its lock dies with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from treadle.durable_names import is_still


@contextlib.contextmanager
def exclusive(root: Path, name: str) -> Iterator[None]:
    """Waits until nobody else below `root` is in a block of that name.

    The lock's file goes with its holder, or is swept up like a dead import's.
    """
    path = root / f"{name}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not is_still(path, descriptor):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)
