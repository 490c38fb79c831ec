"""Files that came over the network and belong to no artifact yet, each by its content.

    <store>/uploads/<hex>          whole, read-only
    <store>/uploads/<hex>.part     arriving; who brings it holds an flock on it

They outlive every process, so that whoever brings a file goes on where it was cut off, and go after a day.
All of it blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import FailedPrecondition, OutOfRange, ResourceExhausted
from treadle.models.stored_folder import file_digest
from treadle.transfer.partial_file import PartialFile
from treadle_registry.names import check_digest
from treadle_registry.store.staging import disk_errors
from treadle_registry.store.store import Store

KEPT_S = 86_400.0
"""From the last byte that came, or the last use, to the end."""
WRONG_OFFSET = "WRONG_OFFSET"


@dataclass(frozen=True, slots=True)
class Arrived:
    """How much of a file is here, in bytes, and whether that is all of it."""

    size: int
    complete: bool = False


class Uploads:
    """The folder of uploads of one store; several processes may use it."""

    def __init__(self, store: Store, max_bytes: int = 1 << 62) -> None:
        """`max_bytes` bounds all uploads together, those that arrive counted whole."""
        self._store, self._max_bytes = store, max_bytes
        self._folder = store.root / "uploads"

    def prepare(self) -> None:
        """Makes the folder where it is not there yet."""
        self._folder.mkdir(exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a whole file lies, or would lie; raises InvalidArgument for what is no digest."""
        return self._folder / check_digest(digest, "digest").removeprefix("sha256:")

    def partial(self, digest: str) -> Path:
        """Where a file lies while it arrives."""
        path = self.path(digest)
        return path.with_name(path.name + ".part")

    def arrived(self, digest: str, heard: Callable[[int], None] = lambda count: None) -> Arrived:
        """How much is here. A file of an artifact is here whole, once its content has proved to be right.

        Such a file is read, a second a gigabyte, the first time that it is asked for in a day; `heard` is
        told of it, and may raise to end it.
        """
        path = self.path(digest)
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            _begin_anew(path, found)
            return Arrived(found.st_size, complete=True)
        with contextlib.suppress(OSError):
            blob = self._store.blob_path(digest)
            if file_digest(blob, heard) == digest:
                self.prepare()
                # A name of its own: the artifact may go before the import comes.
                with contextlib.suppress(FileExistsError):
                    os.link(blob, path)
                return Arrived(path.stat().st_size, complete=True)
        with contextlib.suppress(FileNotFoundError):
            return Arrived(self.partial(digest).stat().st_size)
        return Arrived(0)

    def begin(self, digest: str, total: int, offset: int, reserved: int) -> PartialFile | None:
        """The file to append to from `offset` on, or None where it is whole already.

        `reserved` bytes of other uploads are still to come. Raises OutOfRange or FailedPrecondition
        (WRONG_OFFSET, with `committed_bytes`) where another offset is due, Unavailable
        (TRANSFER_IN_PROGRESS), and ResourceExhausted: DISK_FULL, UPLOADS_FULL.
        """
        if self.path(digest).exists():
            return None
        with disk_errors("an upload"):
            self.prepare()
            partial = PartialFile.open(self.partial(digest))
        try:
            if partial.size > total:
                partial.start_over()
            if offset != partial.size:
                raise _wrong_offset(offset, partial.size)
            self._check_room(total - partial.size, reserved)
        except BaseException:
            if partial.size == 0:
                partial.remove()
            partial.close()
            raise
        return partial

    def _check_room(self, coming: int, reserved: int) -> None:
        used = sum(self._sizes())
        if used + coming + reserved > self._max_bytes:
            raise ResourceExhausted(
                f"{used} bytes of uploads wait for an import and {reserved} are still to come; with {coming} "
                f"more they pass the bound of {self._max_bytes}; import what was uploaded, or wait: after a "
                "day it goes",
                reason="UPLOADS_FULL",
            )
        free = shutil.disk_usage(self._store.root).free
        if free < coming + reserved:
            raise ResourceExhausted(
                f"{coming} bytes are to come and the store's disk has {free} free; free some space first",
                reason="DISK_FULL",
            )

    def _sizes(self) -> list[int]:
        """Of what takes room here alone: what an artifact has, too, takes none."""
        sizes = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    if stat.st_nlink == 1:
                        sizes.append(stat.st_size)
        return sizes

    def forget(self, digest: str) -> None:
        """Removes a whole file: an artifact has it now, or it is damaged."""
        self.path(digest).unlink(missing_ok=True)

    def sweep(self, now: float | None = None) -> int:
        """Removes what nobody has touched for a day; gives how many files that were."""
        before = (time.time() if now is None else now) - KEPT_S
        swept = 0
        for path in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                # A link to a blob has the blob's times, but for this one.
                if path.stat().st_ctime < before:
                    swept += _removed(path)
        return swept


def _begin_anew(path: Path, found: os.stat_result) -> None:
    """Has the day begin anew that a file is kept, where that can be; raises FileNotFoundError."""
    try:
        # The mode that it has already: that sets the time at which `sweep` looks, and no other.
        path.chmod(stat.S_IMODE(found.st_mode))
    except FileNotFoundError:
        raise
    except OSError:
        return


def _removed(path: Path) -> bool:
    """Removes a file that nobody brings at the moment."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _wrong_offset(offset: int, committed: int) -> OutOfRange | FailedPrecondition:
    kind = OutOfRange if offset > committed else FailedPrecondition
    return kind(
        f"the upload goes on at {committed}, not at {offset}; ask GetUpload, and go on there",
        reason=WRONG_OFFSET,
        metadata={"committed_bytes": str(committed)},
    )
