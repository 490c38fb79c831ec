"""The index of artifacts, and when each was used last. They are the store's: rows follow its manifests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from treadle.errors import NotFound
from treadle_registry.catalog.database import Database


class ArtifactTable:
    """Digests of what the store has, with the time of their last use in seconds since 1970."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def index(self, found: Mapping[str, float]) -> None:
        """Makes the index what the store has: digests, with the times at which they came there."""
        with self._db.transaction():
            gone = [(digest,) for digest in self.last_uses() if digest not in found]
            self._db.executemany("DELETE FROM artifacts WHERE digest = ?", gone)
            for digest, create_time in found.items():
                self.add(digest, create_time)

    def add(self, digest: str, use_time: float) -> None:
        """Adds one to the index, used at `use_time`; one that is there was used then, too."""
        self._db.execute(
            "INSERT INTO artifacts (digest, last_use_time) VALUES (?, ?) ON CONFLICT (digest) "
            "DO UPDATE SET last_use_time = max(last_use_time, excluded.last_use_time)",
            (digest, use_time),
        )

    def used(self, times: Mapping[str, float]) -> None:
        """Keeps when artifacts were used; what is not in the index is passed over."""
        with self._db.transaction():
            self._db.executemany(
                "UPDATE artifacts SET last_use_time = max(last_use_time, ?) WHERE digest = ?",
                [(use_time, digest) for digest, use_time in times.items()],
            )

    def last_uses(self) -> dict[str, float]:
        """Every artifact, the least recently used first."""
        query = "SELECT digest, last_use_time FROM artifacts ORDER BY last_use_time, digest"
        return dict(self._db.execute(query).fetchall())

    def has(self, digest: str) -> bool:
        """Whether it is in the index."""
        return self._db.one("SELECT 1 FROM artifacts WHERE digest = ?", digest) is not None

    def page(self, after: str, limit: int) -> list[str]:
        """Digests above `after`, in order."""
        query = "SELECT digest FROM artifacts WHERE digest > ? ORDER BY digest LIMIT ?"
        return [digest for (digest,) in self._db.execute(query, (after, limit))]

    def remove(self, digests: Iterable[str]) -> None:
        """Takes them out of the index."""
        with self._db.transaction():
            self._db.executemany("DELETE FROM artifacts WHERE digest = ?", [(digest,) for digest in digests])

    def need(self, digest: str) -> None:
        """Raises NotFound for one that is not in the index."""
        if not self.has(digest):
            raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND")
