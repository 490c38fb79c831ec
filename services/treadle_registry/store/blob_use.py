"""How many artifacts share each file of the store, and what going without one of them would free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from treadle_registry.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Share:
    """An artifact's different files: their sizes in bytes by digest."""

    files: Mapping[str, int]

    @classmethod
    def of(cls, manifest: Manifest) -> Share:
        """The files of a manifest, each once."""
        return cls({file.digest: file.size for file in (*manifest.files, *manifest.source_files)})


class BlobUse:
    """Counts the users of every file."""

    def __init__(self, shares: Mapping[str, Share]) -> None:
        self._shares = shares
        self._users = Counter(file for share in shares.values() for file in share.files)
        sizes = {file: size for share in shares.values() for file, size in share.files.items()}
        self.total = sum(sizes.values())
        """Bytes of all files that somebody uses."""

    def freed_by(self, digest: str) -> int:
        """Bytes that nobody but this artifact uses."""
        return sum(size for file, size in self._shares[digest].files.items() if self._users[file] == 1)

    def remove(self, digest: str) -> int:
        """Goes on without an artifact; gives the bytes that this frees."""
        freed = self.freed_by(digest)
        self._users.subtract(self._shares[digest].files.keys())
        self.total -= freed
        return freed

    def put_back(self, digest: str) -> None:
        """Undoes a removal."""
        self._users.update(self._shares[digest].files.keys())
        self.total += self.freed_by(digest)
