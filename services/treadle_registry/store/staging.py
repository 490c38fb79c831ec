"""A folder to build an artifact in, which counts as rubbish once its owner is dead.

The owner holds an flock on a file beside the folder. The kernel drops it however the owner ends, so nobody
has to guess by age or by process id whether a folder is still in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from treadle.durable_names import is_still
from treadle.errors import FailedPrecondition, ResourceExhausted
from treadle.models.stored_folder import StoredFile, file_digest

_CHUNK = 1 << 20
READ_ONLY = 0o444
FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY_STORE = "STORE_READ_ONLY"
NOT_WRITABLE_STORE = "STORE_NOT_WRITABLE"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)

Progress = Callable[[int], None]
"""Told how many more bytes are done."""


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Says in plain words that the disk is full, or that it may not be written to."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if _is(error, FULL, sqlite3.SQLITE_FULL):
            raise ResourceExhausted(
                f"the store's disk is full while writing {what}; free some space and try again",
                reason="DISK_FULL",
            ) from error
        if _is(error, (errno.EROFS,), sqlite3.SQLITE_READONLY):
            raise FailedPrecondition(
                f"the store is read-only, and {what} cannot be written; mount it to be written to",
                reason=READ_ONLY_STORE,
            ) from error
        if _is(error, (errno.EACCES, errno.EPERM), sqlite3.SQLITE_PERM):
            raise FailedPrecondition(
                f"the registry may not write {what} in the store; give its user the right to",
                reason=NOT_WRITABLE_STORE,
            ) from error
        raise


def _is(error: OSError | sqlite3.OperationalError, numbers: tuple[int, ...], code: int) -> bool:
    if isinstance(error, OSError):
        return error.errno in numbers
    # The upper bits say more than is needed.
    return error.sqlite_errorcode & 0xFF == code


def check_room(root: Path, needed_bytes: int, what: str) -> None:
    """Refuses early what the disk below `root` has no room for; `what` begins the message: "the model has".

    Raises ResourceExhausted (DISK_FULL).
    """
    free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise ResourceExhausted(
            f"{what} {needed_bytes} bytes and the store's disk {free} free; free some space first",
            reason="DISK_FULL",
            metadata={"needed_bytes": str(needed_bytes)},
        )


class Staging:
    """`artifact/canonical/` and `artifact/source/` in the making.

    Files are hashed as they are written, made durable and read-only; `files` knows them by their path
    below `artifact/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifact = folder / "artifact"
        self.files: dict[str, StoredFile] = {}
        for name in ("canonical", "source"):
            (self.artifact / name).mkdir(parents=True)

    def path(self, name: str) -> Path:
        """Where the file `name` ("canonical/config.json") lies."""
        return self.artifact / PurePosixPath(name)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """Gives the function that appends to a new file; the file is whole at the block's end."""
        path, digest, size = self.path(name), hashlib.sha256(), 0
        path.parent.mkdir(exist_ok=True)
        with disk_errors(name), path.open("xb", buffering=0) as file:

            def write(data: bytes | memoryview) -> None:
                nonlocal size
                digest.update(data)
                view = memoryview(data).cast("B")
                size += len(view)
                while view:
                    view = view[file.write(view) :]

            yield write
            os.fchmod(file.fileno(), READ_ONLY)
            os.fsync(file.fileno())
        self._record(name, f"sha256:{digest.hexdigest()}", size)

    @contextlib.contextmanager
    def create_at_offsets(self, name: str) -> Iterator[Callable[[int, bytes | memoryview], None]]:
        """Gives the function that writes at an offset of a new file; it is hashed, and whole, at the end."""
        path = self.path(name)
        with disk_errors(name), path.open("xb", buffering=0) as file:

            def write(offset: int, data: bytes | memoryview) -> None:
                view = memoryview(data).cast("B")
                file.seek(offset)
                while view:
                    view = view[file.write(view) :]

            yield write
            os.fchmod(file.fileno(), READ_ONLY)
            os.fsync(file.fileno())
        self._record(name, file_digest(path), path.stat().st_size)

    def write(self, name: str, data: bytes) -> None:
        """A whole file at once."""
        with self.create(name) as write:
            write(data)

    def copy(self, source: Path, name: str, progress: Progress | None = None) -> None:
        """A copy of `source`; telling `progress` of every chunk."""
        with source.open("rb", buffering=0) as reader, self.create(name) as write:
            while chunk := reader.read(_CHUNK):
                write(chunk)
                if progress:
                    progress(len(chunk))

    def link(self, source: Path, name: str, progress: Progress | None = None) -> None:
        """A second name for `source`, which becomes read-only; hashed like a copy, telling `progress`.

        On another file system, or where the kernel does not let this user link to it, it is copied.
        """
        path, digest, size = self.path(name), hashlib.sha256(), 0
        path.parent.mkdir(exist_ok=True)
        try:
            os.link(source.resolve(), path)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            self.copy(source, name, progress)
            return
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if progress:
                    progress(len(chunk))
            # Another's file cannot be given a mode, and needs none of ours.
            with contextlib.suppress(PermissionError):
                os.fchmod(file.fileno(), READ_ONLY)
            os.fsync(file.fileno())
        self._record(name, f"sha256:{digest.hexdigest()}", size)

    def share(self, existing: str, name: str) -> None:
        """A second name for a file that is already staged."""
        os.link(self.path(existing), self.path(name))
        self._record(name, self.files[existing].digest, self.files[existing].size)

    def _record(self, name: str, digest: str, size: int) -> None:
        self.files[name] = StoredFile(name.split("/", 1)[1], digest, size)

    def listed(self, kind: str) -> tuple[StoredFile, ...]:
        """The files below `kind` ("canonical" or "source"), by name."""
        return tuple(self.files[name] for name in sorted(self.files) if name.startswith(f"{kind}/"))


@contextlib.contextmanager
def staging_folder(root: Path) -> Iterator[Staging]:
    """A fresh staging folder below `root`, owned by this process until the block ends."""
    with disk_errors("the staging folder"):
        name, lock = _owned_name(root)
    folder = root / name
    try:
        folder.mkdir()
        yield Staging(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (root / f"{name}.lock").unlink(missing_ok=True)
        os.close(lock)


def _owned_name(root: Path) -> tuple[str, int]:
    """A name whose lock file this process holds; the sweeper may take an unlocked one away meanwhile."""
    while True:
        name = f"import-{secrets.token_hex(8)}"
        path = root / f"{name}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_still(path, lock):
            return name, lock
        os.close(lock)


def sweep(root: Path) -> int:
    """Removes what dead owners left; gives how many folders that were."""
    swept = 0
    for lock_path in sorted(root.glob("*.lock")):
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            folder = lock_path.with_suffix("")
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
                swept += 1
            lock_path.unlink(missing_ok=True)
        finally:
            os.close(lock)
    return swept
