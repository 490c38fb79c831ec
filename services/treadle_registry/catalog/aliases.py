"""Aliases, and where they have pointed."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from treadle.errors import Aborted, NotFound
from treadle_registry.catalog.database import Database


@dataclass(frozen=True, slots=True)
class Alias:
    """A name, what it means, and the tag that changes with every move. An empty digest: deleted."""

    name: str
    digest: str
    etag: str
    update_time: float


def moved(name: str, digest: str) -> Alias:
    """An alias that means `digest` from now on; an empty one deletes it."""
    return Alias(name, digest, secrets.token_hex(8), time.time())


def check_etag(current: Alias | None, name: str, etag: str) -> None:
    """Raises Aborted (ETAG_MISMATCH) when an etag is given and is not the alias's."""
    if etag and (current is None or current.etag != etag):
        now = f"is {current.etag}" if current else "is gone with the alias"
        raise Aborted(
            f"the alias {name!r} was moved meanwhile: its etag {now}; read it again and decide anew",
            reason="ETAG_MISMATCH",
        )


class AliasTable:
    """Names for digests, and the memory's copy of them, which is read without a look at the disk."""

    def __init__(self, db: Database) -> None:
        self._db = db
        query = "SELECT name, digest, etag, update_time FROM aliases"
        self._current = {row[0]: Alias(*row) for row in db.execute(query)}

    def find(self, name: str) -> Alias | None:
        """The alias, as the last commit left it; for any thread."""
        return self._current.get(name)

    def get(self, name: str) -> Alias:
        """The alias; raises NotFound."""
        alias = self.find(name)
        if alias is None:
            raise NotFound(f"no alias {name!r}; list them with ListAliases", reason="MODEL_NOT_FOUND")
        return alias

    def all(self) -> list[Alias]:
        """Every alias."""
        return list(self._current.values())

    def write(self, alias: Alias) -> None:
        """Writes a move and its entry in the history, within the caller's transaction."""
        row = (alias.name, alias.digest, alias.etag, alias.update_time)
        if alias.digest:
            self._db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)", row)
        else:
            self._db.execute("DELETE FROM aliases WHERE name = ?", (alias.name,))
        self._db.execute(
            "INSERT INTO alias_history (name, digest, etag, update_time) VALUES (?, ?, ?, ?)", row
        )

    def remember(self, alias: Alias) -> None:
        """Takes a move that was committed into the memory's copy."""
        if alias.digest:
            self._current[alias.name] = alias
        else:
            self._current.pop(alias.name, None)

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

    def meanings(self, name: str, limit: int) -> list[str]:
        """The different artifacts that an alias has meant, the last one first."""
        query = (
            "SELECT digest FROM alias_history WHERE name = ? AND digest <> '' "
            "GROUP BY digest ORDER BY max(id) DESC LIMIT ?"
        )
        return [digest for (digest,) in self._db.execute(query, (name, limit))]
