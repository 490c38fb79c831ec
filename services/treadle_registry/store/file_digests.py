"""Digests of files that lie in the store: what has several names is read once."""

from __future__ import annotations

from pathlib import Path

from treadle.models.stored_folder import file_digest

_UNREADABLE = "unreadable"


class FileDigests:
    """Remembers what it has read by inode, size and time, for as long as one import looks at the store."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], str] = {}

    def of(self, path: Path) -> str:
        """The file's digest; what is no digest for a file that is not there or cannot be read."""
        try:
            stat = path.stat()
            key = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if key not in self._known:
                self._known[key] = file_digest(path)
        except OSError:
            return _UNREADABLE
        return self._known[key]
