"""A file on its way: hashed as its bytes come, and in its place only once it is right."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

from treadle.errors import DataLoss
from treadle_registry.sources.hub_client import HubFile
from treadle_registry.store.staging import fsync_folder

_CHUNK = 1 << 20


class PartialFile:
    """What has come of a file. It outlives its process: the next one goes on where this one was."""

    def __init__(self, path: Path, name: str, file: HubFile) -> None:
        """Opens or creates it and hashes what it has; raises OSError."""
        self._path, self._name, self._expected = path, name, file
        self._file = path.open("a+b", buffering=0)
        self.size = 0
        """Bytes that are there."""
        self._digest = self._fresh()
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            self._digest.update(chunk)
            self.size += len(chunk)
        if self.size > file.size:
            self.restart()

    def _fresh(self) -> hashlib._Hash:
        if self._expected.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self._expected.size, usedforsecurity=False)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self.size == 0:
            self._path.unlink(missing_ok=True)

    @property
    def whole(self) -> bool:
        """Whether as many bytes are there as are due."""
        return self.size == self._expected.size

    def restart(self) -> None:
        """Throws away what has come."""
        self._file.truncate(0)
        self.size, self._digest = 0, self._fresh()

    def append(self, data: bytes) -> None:
        """Takes the next bytes; raises OSError, and DataLoss for more than are due."""
        if self.size + len(data) > self._expected.size:
            raise self._mismatch(f"more than {self._expected.size} bytes come")
        view = memoryview(data)
        while view:
            count = self._file.write(view)
            self._digest.update(view[:count])
            self.size += count
            view = view[count:]

    def finish(self, place: Path) -> None:
        """Makes it the file `place`; raises DataLoss (CHECKSUM_MISMATCH) if it is not what the hub names."""
        expected = self._expected.etag
        if (found := self._digest.hexdigest()) != expected:
            raise self._mismatch(f"its hash is {found}, the hub names {expected}")
        os.fsync(self._file.fileno())
        self._path.rename(place)
        fsync_folder(place.parent)

    def _mismatch(self, what: str) -> DataLoss:
        self._path.unlink(missing_ok=True)
        return DataLoss(
            f"{self._name} came damaged and was thrown away: {what}; import again, and look at proxies "
            "where it stays so",
            reason="CHECKSUM_MISMATCH",
            metadata={"file": self._name, "expected_hash": self._expected.etag},
        )
