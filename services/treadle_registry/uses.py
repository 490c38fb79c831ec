"""When artifacts were used last: noted in memory by whoever uses one, written now and then, many at once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from treadle_registry.catalog.artifacts import ArtifactTable


class Uses:
    """`touch` and `touch_file` are for any thread, the rest for the registry's alone.

    Every use is later than all before it, also where the clock was set back meanwhile: who goes first depends
    on the order alone.
    """

    def __init__(
        self,
        artifacts: ArtifactTable,
        files: Callable[[str], frozenset[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`files` gives the digests of an artifact's files; `clock` is in seconds since 1970."""
        self._artifacts, self._files, self._clock = artifacts, files, clock
        self._lock = threading.Lock()
        self._latest = max(artifacts.last_uses().values(), default=0.0)
        self._of_artifacts: dict[str, float] = {}
        self._of_files: dict[str, float] = {}

    def touch(self, digest: str) -> None:
        """Says that an artifact is used just now."""
        with self._lock:
            self._of_artifacts[digest] = self._now()

    def touch_file(self, digest: str) -> None:
        """Says that a file is sent just now: every artifact that has it is used."""
        with self._lock:
            self._of_files[digest] = self._now()

    def add(self, digest: str) -> None:
        """Takes an artifact into the index, used just now."""
        with self._lock:
            now = self._now()
        self._artifacts.add(digest, now)

    def last(self) -> dict[str, float]:
        """When every artifact was used last, in seconds since 1970."""
        kept = self._artifacts.last_uses()
        with self._lock:
            artifacts, files = self._of_artifacts.copy(), self._of_files.copy()
        return kept | self._spread(kept, artifacts, files)

    def keep(self) -> None:
        """Writes what was noted."""
        with self._lock:
            artifacts, files = self._of_artifacts.copy(), self._of_files.copy()
        if not artifacts and not files:
            return
        self._artifacts.used(self._spread(self._artifacts.last_uses(), artifacts, files))
        with self._lock:
            # What was used again meanwhile is not written yet.
            self._of_artifacts = _later(self._of_artifacts, artifacts)
            self._of_files = _later(self._of_files, files)

    def _now(self) -> float:
        self._latest = max(self._clock(), math.nextafter(self._latest, math.inf))
        return self._latest

    def _spread(
        self, kept: dict[str, float], artifacts: dict[str, float], files: dict[str, float]
    ) -> dict[str, float]:
        """The noted uses of artifacts in the index, those of their files included."""
        noted = {digest: use for digest, use in artifacts.items() if digest in kept}
        if files:
            for digest, use in kept.items():
                sent = max((files[file] for file in files.keys() & self._files(digest)), default=0.0)
                if sent:
                    noted[digest] = max(sent, noted.get(digest, use))
        return noted


def _later(noted: dict[str, float], written: dict[str, float]) -> dict[str, float]:
    return {digest: use for digest, use in noted.items() if use != written.get(digest)}
