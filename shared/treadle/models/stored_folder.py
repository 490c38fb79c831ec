"""A model's folder in the store, and the check that it holds what the registry says.

Whoever loads a file hashes it first or meanwhile: a disk that lies, and a hand that slipped, change no time
and no size, so nothing less than the content tells.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import Cancelled, DataLoss

_CHUNK = 1 << 20
DAMAGED = "DAMAGED_FILE"
"""The reason of every DataLoss raised here."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file by its path within a folder, its digest ("sha256:" and 64 hexadecimal digits) and its size."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """The canonical folder of an artifact on this machine, and the files that belong into it."""

    path: Path
    artifact_digest: str
    files: tuple[StoredFile, ...]

    def verify(
        self, names: Collection[str] | None = None, *, stopped: Callable[[], bool] = lambda: False
    ) -> int:
        """Hashes the files `names`, or all, and gives how many bytes they have.

        A name that the registry does not list must not be there; where all are asked for, nothing else may.
        Blocks for about a second a gigabyte, without the interpreter's lock. `stopped` is asked every
        megabyte: Cancelled is raised once it says True. Raises DataLoss (DAMAGED_FILE) for the first file
        that is missing, changed or a stranger, and OSError for a folder or file that cannot be read.
        """
        next(self.path.iterdir(), None)
        listed = {file.path: file for file in self.files}
        present = self._present() if names is None else (name for name in names if self._is_there(name))
        for name in present:
            if name not in listed:
                raise self._damaged(name, "", "is none of the model's files; take it away")
        read = 0
        for file in self.files:
            if names is None or file.path in names:
                read += self._verify_one(file, stopped)
        return read

    def state(self) -> frozenset[tuple[str, int, int, int]]:
        """Path, inode, size and time of change of each file: what was put right looks different."""
        found = set()
        for name in self._present():
            try:
                stat = (self.path / name).stat()
            except FileNotFoundError:
                continue
            found.add((name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return frozenset(found)

    def _is_there(self, name: str) -> bool:
        return (self.path / name).exists()

    def _present(self) -> Iterator[str]:
        return (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if not path.is_dir())

    def _verify_one(self, file: StoredFile, stopped: Callable[[], bool]) -> int:
        again = "import the model again, which replaces it"

        def go_on(count: int) -> None:
            if stopped():
                raise Cancelled("the check was called off")

        try:
            digest, size = _digest(self.path / file.path, go_on)
        except FileNotFoundError:
            raise self._damaged(file.path, file.digest, f"is gone; {again}") from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise self._damaged(file.path, file.digest, f"cannot be read from the disk; {again}") from error
        if digest != file.digest:
            sizes = f"{size} bytes" if size == file.size else f"{size} bytes where {file.size} are due"
            raise self._damaged(
                file.path,
                file.digest,
                f"is damaged: its digest is {digest} ({sizes}), expected is {file.digest}; {again}",
                digest,
            )
        return size

    def _damaged(self, name: str, expected: str, what: str, found: str = "") -> DataLoss:
        return DataLoss(
            f"the file {name} of {self.artifact_digest} {what}",
            reason=DAMAGED,
            metadata={
                "artifact": self.artifact_digest,
                "file": name,
                "expected_digest": expected,
                "found_digest": found,
            },
        )


def _digest(path: Path, heard: Callable[[int], None]) -> tuple[str, int]:
    """A file's digest and size."""
    digest, size, chunk = hashlib.sha256(), 0, bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
            size += count
            heard(count)
    return f"sha256:{digest.hexdigest()}", size


def file_digest(path: Path, heard: Callable[[int], None] = lambda count: None) -> str:
    """The digest of a file's content, as `StoredFile` has it; raises OSError.

    `heard` is told how many bytes were read, each megabyte; what it raises ends the reading.
    """
    return _digest(path, heard)[0]
