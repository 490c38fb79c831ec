"""Aliases, and where they have pointed."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from treadle.errors import Aborted, NotFound
from treadle_registry.catalog.artifacts import ArtifactTable
from treadle_registry.catalog.database import Database


@dataclass(frozen=True, slots=True)
class Alias:
    """A name, what it means, and the tag that changes with every move. An empty digest: deleted."""

    name: str
    digest: str
    etag: str
    update_time: float


class AliasTable:
    """Names for digests, moved by compare-and-swap."""

    def __init__(self, db: Database, artifacts: ArtifactTable) -> None:
        self._db, self._artifacts = db, artifacts

    def get(self, name: str) -> Alias:
        """The alias; raises NotFound."""
        row = self._db.one("SELECT name, digest, etag, update_time FROM aliases WHERE name = ?", name)
        if row is None:
            raise NotFound(f"no alias {name!r}; list them with ListAliases", reason="MODEL_NOT_FOUND")
        return Alias(*row)

    def set(self, name: str, digest: str, etag: str = "") -> Alias:
        """Creates or moves an alias; one that is there already stays as it is.

        Raises NotFound for an unknown artifact and Aborted when `etag` is given and is not the alias's.
        """
        with self._db.transaction():
            self._artifacts.need(digest)
            current = self._current(name, etag)
            if current is not None and current.digest == digest:
                return current
            return self._record(name, digest)

    def delete(self, name: str, etag: str = "") -> None:
        """Forgets an alias, but not its history; raises NotFound and Aborted."""
        with self._db.transaction():
            self.get(name)
            self._current(name, etag)
            self._record(name, "")

    def _current(self, name: str, etag: str) -> Alias | None:
        try:
            current = self.get(name)
        except NotFound:
            current = None
        if etag and (current is None or current.etag != etag):
            now = f"is {current.etag}" if current else "is gone with the alias"
            raise Aborted(
                f"the alias {name!r} was moved meanwhile: its etag {now}; read it again and decide anew",
                reason="ETAG_MISMATCH",
            )
        return current

    def _record(self, name: str, digest: str) -> Alias:
        moved = Alias(name, digest, secrets.token_hex(8), time.time())
        row = (moved.name, moved.digest, moved.etag, moved.update_time)
        if digest:
            self._db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)", row)
        else:
            self._db.execute("DELETE FROM aliases WHERE name = ?", (name,))
        self._db.execute(
            "INSERT INTO alias_history (name, digest, etag, update_time) VALUES (?, ?, ?, ?)", row
        )
        return moved

    def page(self, after: str, limit: int) -> list[Alias]:
        """Aliases by name, above `after`."""
        query = "SELECT name, digest, etag, update_time FROM aliases WHERE name > ? ORDER BY name LIMIT ?"
        return [Alias(*row) for row in self._db.execute(query, (after, limit))]

    def history(self, name: str, before: int, limit: int) -> list[tuple[int, Alias]]:
        """Where an alias has pointed, newest first, with numbers that fall; below `before`."""
        query = (
            "SELECT id, name, digest, etag, update_time FROM alias_history "
            "WHERE name = ? AND id < ? ORDER BY id DESC LIMIT ?"
        )
        return [(number, Alias(*row)) for number, *row in self._db.execute(query, (name, before, limit))]
