"""The index of artifacts. They are the store's; the rows are made from its manifests at every start."""

from __future__ import annotations

from collections.abc import Iterable

from treadle.errors import FailedPrecondition, NotFound
from treadle_registry.catalog.database import Database


class ArtifactTable:
    """Digests of what the store has."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def index(self, digests: Iterable[str]) -> None:
        """Makes the index what the store has."""
        with self._db.transaction():
            self._db.execute("DELETE FROM artifacts")
            self._db.executemany("INSERT INTO artifacts VALUES (?)", [(digest,) for digest in digests])

    def add(self, digest: str) -> None:
        """Adds one to the index."""
        self._db.execute("INSERT OR IGNORE INTO artifacts VALUES (?)", (digest,))

    def has(self, digest: str) -> bool:
        """Whether it is in the index."""
        return self._db.one("SELECT 1 FROM artifacts WHERE digest = ?", digest) is not None

    def page(self, after: str, limit: int) -> list[str]:
        """Digests above `after`, in order."""
        query = "SELECT digest FROM artifacts WHERE digest > ? ORDER BY digest LIMIT ?"
        return [digest for (digest,) in self._db.execute(query, (after, limit))]

    def remove(self, digest: str) -> None:
        """Takes it out of the index; raises NotFound, and FailedPrecondition while aliases hold it."""
        with self._db.transaction():
            self.need(digest)
            rows = self._db.execute("SELECT name FROM aliases WHERE digest = ? ORDER BY name", (digest,))
            if names := [name for (name,) in rows]:
                raise FailedPrecondition(
                    f"the artifact is held by {len(names)} aliases: {', '.join(names[:10])}; "
                    "delete or move them first",
                    reason="ARTIFACT_IN_USE",
                    metadata={"aliases": ",".join(names[:10])},
                )
            self._db.execute("DELETE FROM artifacts WHERE digest = ?", (digest,))

    def need(self, digest: str) -> None:
        """Raises NotFound for one that is not in the index."""
        if not self.has(digest):
            raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND")
