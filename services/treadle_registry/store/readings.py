"""Manifests as they were read last, so that what is asked for often is not read every time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from treadle.errors import DataLoss, NotFound
from treadle_registry.store.store import MANIFEST, Published, Store

_Key = tuple[int, int, int]


class Readings:
    """Reads manifests through a bounded memory.

    `read` looks whether the file is the one that was read, and blocks for that; `recent` does not look, and
    gives only what `read` found within the last `trusted_s` seconds. Any thread may call `recent`.
    """

    def __init__(
        self,
        store: Store,
        *,
        capacity: int,
        trusted_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self._capacity, self._trusted_s, self._clock = store, capacity, trusted_s, clock
        self._read: OrderedDict[str, tuple[_Key, Published]] = OrderedDict()
        self._looked: dict[str, float] = {}
        self.num_read = 0
        """Manifests that were read from the disk."""

    def recent(self, digest: str) -> Published | None:
        """The artifact, if it was there a moment ago."""
        known, looked = self._read.get(digest), self._looked.get(digest)
        if known is None or looked is None or self._clock() - looked > self._trusted_s:
            return None
        return known[1]

    def read(self, digest: str) -> Published:
        """The artifact; raises NotFound, or DataLoss for a manifest that cannot be read."""
        try:
            key = _key(self.store.folder(digest) / MANIFEST)
            known = self._read.get(digest)
            if known is None or known[0] != key:
                self.num_read += 1
                known = key, self.store.get(digest)
        except FileNotFoundError:
            self.forget(digest)
            raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND") from None
        except (DataLoss, NotFound):
            self.forget(digest)
            raise
        self._read[digest] = known
        self._read.move_to_end(digest)
        self._looked[digest] = self._clock()
        while len(self._read) > self._capacity:
            self.forget(next(iter(self._read)))
        return known[1]

    def forget(self, digest: str) -> None:
        """Takes one out of the memory: it is gone, or about to be."""
        self._read.pop(digest, None)
        self._looked.pop(digest, None)


def _key(path: Path) -> _Key:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
