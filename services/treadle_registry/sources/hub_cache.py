"""A repository in the Hugging Face cache: the folder that every tool of theirs shares.

    <cache>/models--owner--name/blobs/<etag>              a file by its hash
    <cache>/models--owner--name/blobs/<etag>.incomplete   one that is on its way
    <cache>/models--owner--name/snapshots/<commit>/<name> a link to its blob
    <cache>/models--owner--name/refs/<branch or tag>      the commit that it means
    <cache>/.locks/models--owner--name/<etag>.lock        held by who downloads it; dies with its process

https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock

from treadle.durable_names import fsync_folder
from treadle.errors import PermissionDenied, ResourceExhausted, Unavailable
from treadle.transfer.file_names import is_inner_folder
from treadle_registry.sources.hub_client import COMMIT, HubFile, git_hash

_LOOK_EVERY_S = 0.25
_PATIENCE_S = 600.0
_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def cache_errors(cache: Path) -> Iterator[None]:
    """Says that the cache's disk is full (DISK_FULL), or not to be written (HUB_CACHE_NOT_WRITABLE)."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceExhausted(
                f"the disk of the hub's cache {cache} is full; free some space, or name another folder in "
                "HF_HUB_CACHE, and import again: what has come is kept",
                reason="DISK_FULL",
            ) from error
        if error.errno in _REFUSED:
            raise PermissionDenied(
                f"the registry may not write into the hub's cache {cache} ({error.strerror}); give it the "
                "right to, or name another folder in HF_HUB_CACHE",
                reason="HUB_CACHE_NOT_WRITABLE",
            ) from error
        raise


class HubCache:
    """One repository's part of the cache."""

    def __init__(self, cache: Path, repository: str) -> None:
        self.cache, self._repository = cache, repository
        name = repo_folder_name(repo_id=repository, repo_type="model")
        self.folder, self._locks = cache / name, cache / ".locks" / name

    def blob(self, file: HubFile) -> Path:
        """Where the file's content lies, or will."""
        return self.folder / "blobs" / file.etag

    def partial(self, file: HubFile) -> Path:
        """Where it lies while it is on its way."""
        return self.folder / "blobs" / f"{file.etag}.incomplete"

    def pointer(self, commit: str, name: str) -> Path:
        """The file by its name."""
        return self.folder / "snapshots" / commit / name

    def commit_of(self, revision: str) -> str | None:
        """The commit that the cache has for a branch, a tag or a commit."""
        if COMMIT.fullmatch(revision):
            return revision if (self.folder / "snapshots" / revision).is_dir() else None
        try:
            commit = (self.folder / "refs" / revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def cached(self, commit: str, name: str) -> Path | None:
        """The file of a snapshot; asks nobody."""
        found = try_to_load_from_cache(self._repository, name, cache_dir=self.cache, revision=commit)
        return Path(found) if isinstance(found, str) and Path(found).is_file() else None

    def names(self, commit: str) -> set[str]:
        """The names of a snapshot's files, those of its folders that may belong to a model among them."""
        with contextlib.suppress(OSError):
            folder = self.folder / "snapshots" / commit
            listed = list(folder.iterdir())
            for below in [path for path in listed if is_inner_folder(path.name) and path.is_dir()]:
                listed += below.iterdir()
            found = [path for path in listed if path.is_file()]
            return {path.relative_to(folder).as_posix() for path in found}
        return set()

    def find(self, commit: str, name: str, file: HubFile) -> Path | None:
        """The file's content if the cache has it whole.

        Git's files are hashed here; of large ones the size is asked, and they are hashed in the store.
        """
        for path in (self.pointer(commit, name), self.blob(file)):
            with contextlib.suppress(OSError):
                if path.stat().st_size == file.size and (file.sha256 or git_sha1(path) == file.git_sha1):
                    return path.resolve()
        return None

    def make_folders(self, commit: str) -> None:
        """Raises OSError."""
        for folder in (self.folder / "blobs", self.folder / "snapshots" / commit, self._locks):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self, file: HubFile, waiting: Callable[[], None]) -> Iterator[None]:
        """Holds the file's lock, the one that every client of the hub takes; calls `waiting` until then.

        Raises Unavailable when whoever holds it has got nothing for ten minutes.
        """
        path, last, since = self._locks / f"{file.etag}.lock", -1, time.monotonic()
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(WeakFileLock(path, timeout=_LOOK_EVERY_S))
                    break
                except TimeoutError:
                    waiting()
                size = self.partial_size(file)
                if size != last:
                    last, since = size, time.monotonic()
                elif time.monotonic() > since + _PATIENCE_S:
                    raise Unavailable(
                        f"another process holds {path} and downloads nothing; end it and import again",
                        reason="HUB_FILE_LOCKED",
                    )
            yield

    def partial_size(self, file: HubFile) -> int:
        """How much of a file has come, whoever fetches it."""
        with contextlib.suppress(OSError):
            return self.partial(file).stat().st_size
        return 0

    def point(self, commit: str, name: str, path: Path) -> None:
        """Gives a content its name in the snapshot; raises OSError."""
        pointer = self.pointer(commit, name)
        with contextlib.suppress(OSError):
            if pointer.samefile(path):
                return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        made = pointer.with_name(f".{secrets.token_hex(8)}")
        try:
            if constants.HF_HUB_DISABLE_SYMLINKS:
                os.link(path, made)
            else:
                made.symlink_to(os.path.relpath(path, pointer.parent.resolve()))
            made.replace(pointer)
        finally:
            made.unlink(missing_ok=True)

    def remember(self, revision: str, commit: str) -> None:
        """Writes what a branch or tag means, for who asks without the hub; raises OSError."""
        if revision == commit or self.commit_of(revision) == commit:
            return
        ref = self.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        made = ref.with_name(f"{ref.name}.{secrets.token_hex(4)}.tmp")
        made.write_text(commit)
        made.replace(ref)
        fsync_folder(ref.parent)


def git_sha1(path: Path) -> str:
    """Git's name of a file's content."""
    with path.open("rb") as file:
        digest = git_hash(os.fstat(file.fileno()).st_size)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
