"""The store on disk: blobs by their content, and artifacts that are folders of hard links to them.

    <store>/blobs/sha256/ab/<hex>            every file once, read-only
    <store>/artifacts/<hex>/canonical/       what services load
    <store>/artifacts/<hex>/source/          what was imported, as it came
    <store>/artifacts/<hex>/manifest.json
    <store>/tmp/                             what is being built; see `staging`
    <store>/uploads/                         what came over the network; see `uploads`
    <store>/format.json                      which release's layout this is; see `format`

Hard links and not symbolic ones: a canonical folder is whole in itself, so that a worker can be given that
folder alone (bind mount, copy), a check for links that lead out has no exception, and the file system counts
the users of a blob for us. An artifact comes into being by one rename of a folder whose manifest was
written last, and goes by one rename back to `tmp/`: there is no moment at which half of it counts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from treadle.durable_names import fsync_folder
from treadle.errors import DataLoss, FailedPrecondition, NotFound
from treadle.models.stored_folder import StoredFile
from treadle_registry.names import check_digest
from treadle_registry.store.file_digests import FileDigests
from treadle_registry.store.format import migrate
from treadle_registry.store.manifest import Manifest
from treadle_registry.store.staging import (
    FULL,
    NOT_WRITABLE_STORE,
    READ_ONLY_STORE,
    Staging,
    disk_errors,
    staging_folder,
    sweep,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Published:
    """An artifact that is in the store."""

    manifest: Manifest
    canonical_folder: Path
    already_present: bool


class Store:
    """The folder of a model store. Several processes may use one; see `open`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._artifacts = root / "artifacts"
        self._tmp = root / "tmp"

    @classmethod
    def open(cls, path: Path) -> Store:
        """Opens or creates the store at `path`, migrates it, and sweeps up after dead imports.

        Raises FailedPrecondition when the folder cannot be used (STORE_NOT_WRITABLE, STORE_READ_ONLY) or is a
        newer release's (NEWER_STORE).
        """
        store = cls(Path(path).expanduser().absolute())
        try:
            store.root.mkdir(parents=True, exist_ok=True)
            with store._lock():
                migrate(store.root)
            for folder in (store._blobs, store._artifacts, store._tmp):
                folder.mkdir(parents=True, exist_ok=True)
            store.sweep()
        except OSError as error:
            if error.errno in FULL:
                raise
            raise FailedPrecondition(
                f"the store {store.root} cannot be used: {error.strerror}; give another one in TREADLE_STORE",
                reason=READ_ONLY_STORE if error.errno == errno.EROFS else NOT_WRITABLE_STORE,
            ) from error
        return store

    def sweep(self) -> None:
        """Removes what dead imports left: folders without an owner, blobs without an artifact."""
        sweep(self._tmp)
        with self._lock():
            self._collect()

    def staging(self) -> contextlib.AbstractContextManager[Staging]:
        """A folder on the store's file system to build an artifact in."""
        return staging_folder(self._tmp)

    def blob_path(self, digest: str) -> Path:
        """Where the blob of a digest lies, or would lie."""
        digits = check_digest(digest, "digest").removeprefix("sha256:")
        return self._blobs / digits[:2] / digits

    def folder(self, digest: str) -> Path:
        """Where the artifact of a digest lies, or would lie."""
        return self._artifacts / check_digest(digest, "digest").removeprefix("sha256:")

    def get(self, digest: str, *, already_present: bool = True) -> Published:
        """The artifact; raises NotFound, DataLoss for a manifest that cannot be read, and FailedPrecondition
        (NEWER_MANIFEST) for one that a newer release wrote."""
        path = self.folder(digest) / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND") from None
        manifest = Manifest.from_json(text, str(path))
        if manifest.digest != digest:
            raise DataLoss(
                f"{path} is the manifest of another artifact; import the model again, which replaces it",
                reason="CORRUPT_MANIFEST",
            )
        return Published(manifest, path.parent / "canonical", already_present)

    def digests(self) -> list[str]:
        """The digests of all artifacts."""
        found = (f"sha256:{path.parent.name}" for path in self._artifacts.glob(f"*/{MANIFEST}"))
        return sorted(found)

    def readable(self) -> Iterator[Published]:
        """All artifacts but those that go meanwhile, or whose manifests cannot be read: they are no one's."""
        for digest in self.digests():
            try:
                yield self.get(digest)
            except (NotFound, DataLoss, FailedPrecondition):
                continue

    def is_whole(self, published: Published) -> bool:
        """Whether every file of the artifact still is what its manifest says; reads all of them."""
        return self._is_whole(published.canonical_folder.parent, published.manifest, FileDigests())

    def publish(self, staging: Staging, manifest: Manifest) -> Published:
        """Makes what was staged an artifact, in one rename; the same artifact twice is the first one.

        Unless that is damaged: then it gives way to this one, and damaged blobs are replaced wherever they
        are linked to.
        """
        target, digests = self.folder(manifest.digest), FileDigests()
        # Hashing may take long, and others wait for the lock.
        known = self._known(manifest.digest, digests)
        for file in staging.files.values():
            digests.of(self.blob_path(file.digest))
        with self._lock(), disk_errors("the artifact"):
            if known is not None and (target / MANIFEST).exists():
                return known
            for name, file in staging.files.items():
                self._link_blob(staging, name, file, digests)
            self._write_manifest(staging.artifact, manifest)
            for path, folders, _ in os.walk(staging.artifact, topdown=False):
                folders.sort()
                fsync_folder(Path(path))
            if target.exists():
                target.rename(staging.folder / "damaged")
            staging.artifact.rename(target)
            fsync_folder(self._artifacts)
        return self.get(manifest.digest, already_present=False)

    def _known(self, digest: str, digests: FileDigests) -> Published | None:
        """The artifact, if it is there and whole."""
        try:
            published = self.get(digest)
        except (NotFound, DataLoss):
            return None
        whole = self._is_whole(published.canonical_folder.parent, published.manifest, digests)
        return published if whole else None

    def _is_whole(self, folder: Path, manifest: Manifest, digests: FileDigests) -> bool:
        expected = {folder / path: file.digest for path, file in listed_files(manifest)} | {
            folder / MANIFEST: ""
        }
        found = {path for path in folder.rglob("*") if not path.is_dir()}
        return found == expected.keys() and all(
            digests.of(path) == digest for path, digest in expected.items() if digest
        )

    def _link_blob(self, staging: Staging, name: str, file: StoredFile, digests: FileDigests) -> None:
        """Gives the staged file its blob's name; where the blob is there, the file becomes a link to it."""
        path, blob = staging.path(name), self.blob_path(file.digest)
        blob.parent.mkdir(exist_ok=True)
        try:
            os.link(path, blob)
        except FileExistsError:
            if digests.of(blob) != file.digest:
                logger.error("a damaged blob is replaced", extra={"blob": file.digest})
                _link_over(path, blob, staging.folder)
                self._link_again(file.digest, staging.folder)
            elif not blob.samefile(path):
                path.unlink()
                os.link(blob, path)
        fsync_folder(blob.parent)

    def _link_again(self, digest: str, aside: Path) -> None:
        """Points every artifact's file of this content at its blob."""
        for published in self.readable():
            for path, file in listed_files(published.manifest):
                if file.digest == digest:
                    place = published.canonical_folder.parent / path
                    _link_over(self.blob_path(digest), place, aside)
                    fsync_folder(place.parent)

    def _write_manifest(self, folder: Path, manifest: Manifest) -> None:
        aside = folder / f"{MANIFEST}.new"
        with aside.open("x", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        aside.rename(folder / MANIFEST)

    def delete(self, *digests: str) -> int:
        """Removes artifacts and the blobs that were theirs alone; gives the freed bytes.

        Raises NotFound where one of them is not there; those before it are gone then.
        """
        with self._lock():
            with staging_folder(self._tmp) as staging:
                for number, digest in enumerate(digests):
                    try:
                        self.folder(digest).rename(staging.folder / f"deleted-{number}")
                    except FileNotFoundError:
                        raise NotFound(
                            f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND"
                        ) from None
                fsync_folder(self._artifacts)
            return self._collect()

    def _collect(self) -> int:
        """Removes blobs that no artifact links to. Publishing holds the same lock from its first link on.

        The number of links does not tell alone: a file of the hub's cache may have its name there, too.
        """
        freed, used = 0, self._inodes()
        for blob in self._blobs.glob("*/*"):
            stat = blob.stat()
            if stat.st_ino not in used:
                blob.unlink()
                freed += stat.st_size if stat.st_nlink == 1 else 0
        return freed

    def _inodes(self) -> set[int]:
        """Of every file of every artifact."""
        folders, found = [self._artifacts], set()
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry))
                    else:
                        found.add(entry.inode())
        return found

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Nobody else links, renames or removes; the lock dies with its process."""
        descriptor = os.open(self.root / "store.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def listed_files(manifest: Manifest) -> list[tuple[str, StoredFile]]:
    """The artifact's files by their path in its folder."""
    kinds = (("canonical", manifest.files), ("source", manifest.source_files))
    return [(f"{kind}/{file.path}", file) for kind, files in kinds for file in files]


def _link_over(existing: Path, name: Path, aside: Path) -> None:
    """Makes `name` a link to `existing`, in one step and whatever it was; `aside` is a folder for it."""
    made = aside / f"link-{secrets.token_hex(8)}"
    os.link(existing, made)
    made.replace(name)
    # Two links to one file: then nothing is renamed.
    made.unlink(missing_ok=True)
