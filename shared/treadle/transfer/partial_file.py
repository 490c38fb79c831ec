"""A file that arrives: appended to, taken up again after any death, and whole by one rename.

Who writes it holds an flock on it, which the kernel drops however the writer ends. All of it blocks.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from treadle.durable_names import fsync_folder, is_still
from treadle.errors import DataLoss, Unavailable, Unimplemented

if sys.platform != "win32":
    import fcntl

_CHUNK = 1 << 20
_HASHED_AT_ONCE = 64 << 20
_ZEROS = bytes(_CHUNK)
_READ_ONLY = 0o444
_AGAIN_S = 1.0


NewHash = Callable[[], "hashlib._Hash"]
"""Begins a hash of a file's content."""


class PartialFile:
    """What has arrived of one file: `size` bytes, which `catch_up` must have hashed before more come."""

    def __init__(self, descriptor: int, path: Path, new_hash: NewHash) -> None:
        self._descriptor, self._path, self._new_hash = descriptor, path, new_hash
        self._digest = new_hash()
        self._hashed = 0
        self.size = os.fstat(descriptor).st_size

    @classmethod
    def open(cls, path: Path, new_hash: NewHash = hashlib.sha256) -> Self:
        """Opens or creates the partial file at `path`; `finish` names the content by `new_hash`.

        Raises Unavailable (TRANSFER_IN_PROGRESS) while another writes it, Unimplemented on
        Windows, and OSError.
        """
        if sys.platform == "win32":
            raise Unimplemented("files are fetched on Linux and macOS: Windows has no flock")
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held the lock may have renamed or removed the file before letting go.
                if is_still(path, descriptor):
                    return cls(descriptor, path, new_hash)
            except BlockingIOError:
                os.close(descriptor)
                raise Unavailable(
                    f"another transfer brings {path.name}; wait for its end",
                    reason="TRANSFER_IN_PROGRESS",
                    retry_after_s=_AGAIN_S,
                ) from None
            os.close(descriptor)

    def catch_up(self) -> bool:
        """Hashes some of what was there when it was opened; whether there is more of it."""
        for piece in self._pieces(_HASHED_AT_ONCE):
            self._digest.update(piece)
            self._hashed += len(piece)
        return self._hashed < self.size

    def _pieces(self, most: int) -> Iterator[memoryview]:
        chunk, end = bytearray(_CHUNK), min(self.size, self._hashed + most)
        while self._hashed < end:
            view = memoryview(chunk)[: end - self._hashed]
            count = os.preadv(self._descriptor, [view], self._hashed)
            if not count:
                raise OSError(f"{self._path} became shorter while it was read")
            yield view[:count]

    def append(self, data: bytes) -> None:
        """Puts `data` behind what is there; raises OSError."""
        assert self._hashed == self.size, "what is there must be hashed before more comes"
        view, at = memoryview(data), self.size
        if data == _ZEROS[: len(data)]:
            # What was sparse stays so.
            view, at = view[:0], at + len(data)
            os.ftruncate(self._descriptor, at)
        while view:
            count = os.pwrite(self._descriptor, view, at)
            view, at = view[count:], at + count
        self._digest.update(data)
        self._hashed = self.size = at

    def start_over(self) -> None:
        """Throws away what is there."""
        os.ftruncate(self._descriptor, 0)
        self._digest = self._new_hash()
        self._hashed = self.size = 0

    def finish(self, digest: str, target: Path) -> None:
        """Makes it the whole file `target`, which is read-only and durable.

        Raises DataLoss (CHECKSUM_MISMATCH) when the content is not that of `digest`; then it is removed.
        """
        assert self._hashed == self.size, "what is there must be hashed before it counts"
        found = f"{self._digest.name}:{self._digest.hexdigest()}"
        if found != digest:
            self.remove()
            raise DataLoss(
                f"what arrived as {digest} is {found} ({self.size} bytes), and was thrown away; send it "
                "again",
                reason="CHECKSUM_MISMATCH",
                metadata={"expected_digest": digest, "found_digest": found},
            )
        os.fchmod(self._descriptor, _READ_ONLY)
        os.fsync(self._descriptor)
        self._path.rename(target)
        fsync_folder(target.parent)

    def remove(self) -> None:
        """Removes it; nothing of it is left to go on from."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Makes what is there durable and lets others go on with it."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
