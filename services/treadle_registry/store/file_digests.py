"""Digests of files that lie in the store: what has several names is read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from treadle.models.stored_folder import file_digest

UNREADABLE = "unreadable"
"""In the place of a digest, for a file that is not there or cannot be read."""


class FileDigests:
    """Remembers what it has read by inode, size and time, for as long as one job looks at the store."""

    def __init__(self, heard: Callable[[int], None] = lambda count: None) -> None:
        """`heard` is told of the bytes that are read."""
        self._heard = heard
        self._known: dict[tuple[int, int, int], str] = {}

    def of(self, path: Path) -> str:
        """The file's digest, or UNREADABLE."""
        try:
            stat = path.stat()
            key = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if key not in self._known:
                self._known[key] = file_digest(path, self._heard)
        except OSError:
            return UNREADABLE
        return self._known[key]
