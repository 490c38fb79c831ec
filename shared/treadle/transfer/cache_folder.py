"""The node cache on disk: what lies there, who holds it, and what gives way. All of it blocks.

    <cache>/blobs/<hex>               every file once, read-only; "<hex>.<bytes>.part" while it arrives
    <cache>/artifacts/<hex>/          an artifact's files so far: hard links to blobs
    <cache>/artifacts/<hex>.lock      held (flock, shared) by who uses it; its time is the last use
    <cache>/cache.lock                held while names change

Locks die with their process, so nobody has to guess whether an entry is still in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from treadle.errors import DataLoss, FailedPrecondition, ResourceExhausted
from treadle.models.stored_folder import StoredFile, file_digest

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class CacheFolder:
    """Blobs, and the artifacts that are made of them."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self._max_bytes = root, max_bytes
        self._blobs, self._artifacts = root / "blobs", root / "artifacts"

    def prepare(self) -> None:
        """Makes the folders; raises OSError."""
        for folder in (self._blobs, self._artifacts):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Says in plain words that the disk is full (ResourceExhausted: DISK_FULL), or that the folder cannot
        be used (FailedPrecondition: NODE_CACHE_NOT_WRITABLE)."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(
                    f"the disk of the node cache {self.root} is full; free some space, or give another in "
                    "TREADLE_NODE_CACHE: what has come is kept",
                    reason="DISK_FULL",
                ) from error
            raise FailedPrecondition(
                f"the node cache {self.root} cannot be used: {error.strerror}; give another one in "
                "TREADLE_NODE_CACHE",
                reason="NODE_CACHE_NOT_WRITABLE",
            ) from error

    def artifact(self, digest: str) -> Path:
        """The folder of an artifact."""
        return self._artifacts / _hex(digest)

    def blob(self, file: StoredFile) -> Path:
        """Where a whole file lies."""
        return self._blobs / _hex(file.digest)

    def partial(self, file: StoredFile) -> Path:
        """Where a file lies while it arrives; its name says how large it will be."""
        return self._blobs / f"{_hex(file.digest)}.{file.size}.part"

    def hold(self, digest: str) -> int:
        """Says that this process uses the artifact, until the descriptor that it gives is closed."""
        path = self._artifacts / f"{_hex(digest)}.lock"
        with self._locked():
            # An evictor holds this lock only together with the cache's: nobody can be waited for here.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
        return descriptor

    def lacks(self, digest: str, file: StoredFile, heard: Callable[[int], None]) -> bool:
        """Whether the artifact's folder lacks the file; one that is damaged counts as lacking, and goes.

        Blocks for about a second a gigabyte; `heard` is told of what is read, and may raise to end it.
        """
        place, blob = self.artifact(digest) / file.path, self.blob(file)
        if _is_whole(place, file, heard):
            return False
        if place.exists() and blob.exists() and place.samefile(blob):
            whole = False
        else:
            whole = _is_whole(blob, file, heard)
        if not whole:
            blob.unlink(missing_ok=True)
        return True

    def make_room(self, files: Iterable[StoredFile]) -> None:
        """Lets go of what was used least recently until `files` fit.

        Raises ResourceExhausted (NODE_CACHE_FULL) where what is in use leaves too little room.
        """
        wanted = {file.digest: file for file in files if not self.blob(file).exists()}.values()
        parts, needed = {self.partial(file) for file in wanted}, sum(file.size for file in wanted)
        with self._locked():
            while (used := self._used(parts)) + needed > self._max_bytes:
                if not self._evict_one(parts):
                    raise ResourceExhausted(
                        f"the node cache {self.root} has {used} bytes that are in use, and {needed} more are "
                        f"needed; raise TREADLE_NODE_CACHE_MAX_BYTES ({self._max_bytes})",
                        reason="NODE_CACHE_FULL",
                    )

    def link(self, digest: str, files: Iterable[StoredFile]) -> None:
        """Gives whole files their names in the artifact's folder; raises FileNotFoundError."""
        with self._locked():
            for file in files:
                place = self.artifact(digest) / file.path
                place.parent.mkdir(parents=True, exist_ok=True)
                aside = self.root / "link"
                aside.unlink(missing_ok=True)
                os.link(self.blob(file), aside)
                aside.replace(place)
                # Two links to one file: then nothing is renamed.
                aside.unlink(missing_ok=True)

    def take_away_strangers(self, digest: str, files: Iterable[StoredFile]) -> None:
        """Removes from the artifact's folder what is none of its files."""
        folder, known = self.artifact(digest), {file.path for file in files}
        with self._locked():
            for path in list(folder.rglob("*")):
                if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
                    path.unlink()

    def _used(self, wanted: set[Path]) -> int:
        """Bytes of whole files, and of those that arrive beside `wanted`, as large as they will be."""
        used = 0
        for path in self._blobs.iterdir():
            if path in wanted:
                continue
            with contextlib.suppress(FileNotFoundError):
                used += int(path.suffixes[0][1:]) if path.suffix == ".part" else path.stat().st_size
        return used

    def _evict_one(self, wanted: set[Path]) -> bool:
        """Lets go of what was used least recently and is not held; False where there is nothing."""
        last_used: list[tuple[float, Path]] = []
        for path in (*self._artifacts.glob("*.lock"), *self._blobs.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path not in wanted and (path.suffix or stat.st_nlink == 1):
                    last_used.append((stat.st_mtime, path))
        return any(self._let_go(path) for _, path in sorted(last_used))

    def _let_go(self, path: Path) -> bool:
        """Removes an artifact by its lock, a file's part, or a file of no artifact, unless it is held."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            if path.suffix == ".lock":
                self._remove_artifact(path.with_suffix(""))
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)

    def _remove_artifact(self, folder: Path) -> None:
        """Removes the folder, and the files that were its alone."""
        files = {path.stat().st_ino for path in folder.rglob("*") if not path.is_dir()}
        shutil.rmtree(folder, ignore_errors=True)
        for blob in self._blobs.iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = blob.stat()
                if stat.st_ino in files and stat.st_nlink == 1:
                    blob.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.root / "cache.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _hex(digest: str) -> str:
    """The digits of a digest; raises DataLoss for what is none, which a path must not be made of."""
    if not _DIGEST.fullmatch(digest):
        raise DataLoss(f"the registry gives {digest[:100]!r} as a digest", reason="BAD_DIGEST")
    return digest.removeprefix("sha256:")


def _is_whole(path: Path, file: StoredFile, heard: Callable[[int], None]) -> bool:
    try:
        return path.stat().st_size == file.size and file_digest(path, heard) == file.digest
    except OSError:
        return False
