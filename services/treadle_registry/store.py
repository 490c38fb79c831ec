"""The store on disk: blobs by their content, and artifacts that are folders of hard links to them.

    <store>/blobs/sha256/ab/<hex>            every file once, read-only
    <store>/artifacts/<hex>/canonical/       what services load
    <store>/artifacts/<hex>/source/          what was imported, as it came
    <store>/artifacts/<hex>/manifest.json
    <store>/tmp/                             what is being built; see `staging`

Hard links and not symbolic ones: a canonical folder is whole in itself, so that a worker can be given that
folder alone (bind mount, copy), a check for links that lead out has no exception, and the file system counts
the users of a blob for us. An artifact comes into being by one rename of a folder whose manifest was
written last, and goes by one rename back to `tmp/`: there is no moment at which half of it counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import DataLoss, FailedPrecondition, NotFound
from treadle_registry.manifest import Manifest, StoredFile
from treadle_registry.names import check_digest
from treadle_registry.staging import Staging, disk_errors, fsync_folder, staging_folder, sweep

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
        """Opens or creates the store at `path` and sweeps up after dead imports.

        Raises FailedPrecondition (STORE_NOT_WRITABLE) when the folder cannot be used.
        """
        store = cls(Path(path).expanduser().absolute())
        try:
            for folder in (store._blobs, store._artifacts, store._tmp):
                folder.mkdir(parents=True, exist_ok=True)
            store.sweep()
        except OSError as error:
            raise FailedPrecondition(
                f"the store {store.root} cannot be used: {error.strerror}; give another one in TREADLE_STORE",
                reason="STORE_NOT_WRITABLE",
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
        """The artifact; raises NotFound, or DataLoss for a manifest that cannot be read."""
        path = self.folder(digest) / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND") from None
        manifest = Manifest.from_json(text, str(path))
        if manifest.digest != digest:
            raise DataLoss(f"{path} is the manifest of another artifact", reason="CORRUPT_MANIFEST")
        return Published(manifest, path.parent / "canonical", already_present)

    def digests(self) -> list[str]:
        """The digests of all artifacts."""
        found = (f"sha256:{path.parent.name}" for path in self._artifacts.glob(f"*/{MANIFEST}"))
        return sorted(found)

    def publish(self, staging: Staging, manifest: Manifest) -> Published:
        """Makes what was staged an artifact, in one rename; the same artifact twice is the first one."""
        target = self.folder(manifest.digest)
        with self._lock(), disk_errors("the artifact"):
            if (target / MANIFEST).exists():
                return self.get(manifest.digest)
            for name, file in staging.files.items():
                self._link_blob(staging.path(name), file)
            self._write_manifest(staging.artifact, manifest)
            for path, folders, _ in os.walk(staging.artifact, topdown=False):
                folders.sort()
                fsync_folder(Path(path))
            staging.artifact.rename(target)
            fsync_folder(self._artifacts)
        return self.get(manifest.digest, already_present=False)

    def _link_blob(self, path: Path, file: StoredFile) -> None:
        """Gives the staged file its blob's name; where the blob is there, the file becomes a link to it."""
        blob = self.blob_path(file.digest)
        blob.parent.mkdir(exist_ok=True)
        try:
            os.link(path, blob)
        except FileExistsError:
            if blob.stat().st_size != file.size:
                raise DataLoss(
                    f"the stored blob {file.digest} has {blob.stat().st_size} bytes where it must have "
                    f"{file.size}; delete the artifacts that hold it and import them again",
                    reason="CORRUPT_BLOB",
                ) from None
            if not blob.samefile(path):
                path.unlink()
                os.link(blob, path)
        fsync_folder(blob.parent)

    def _write_manifest(self, folder: Path, manifest: Manifest) -> None:
        aside = folder / f"{MANIFEST}.new"
        with aside.open("x", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        aside.rename(folder / MANIFEST)

    def delete(self, digest: str) -> int:
        """Removes an artifact and the blobs that were its alone; gives the freed bytes; raises NotFound."""
        with self._lock():
            with staging_folder(self._tmp) as staging:
                try:
                    self.folder(digest).rename(staging.folder / "deleted")
                except FileNotFoundError:
                    raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND") from None
                fsync_folder(self._artifacts)
            return self._collect()

    def _collect(self) -> int:
        """Removes blobs that no artifact links to. Publishing holds the same lock from its first link on."""
        freed = 0
        for blob in self._blobs.glob("*/*"):
            stat = blob.stat()
            if stat.st_nlink == 1:
                blob.unlink()
                freed += stat.st_size
        return freed

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Nobody else links, renames or removes; the lock dies with its process."""
        descriptor = os.open(self.root / "store.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
