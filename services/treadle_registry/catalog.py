"""What the registry remembers: an index of artifacts, aliases and where they have pointed, operations.

SQLite in WAL mode at `<store>/registry.db`, with one writer for good: the registry that holds the lock
beside it. Artifacts themselves are the store's; their rows are made from its manifests at every start.
All of it blocks: the registry calls it in a thread of its own.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.errors import Aborted, FailedPrecondition, NotFound

_MIGRATIONS = (
    """
    CREATE TABLE artifacts (digest TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
    CREATE TABLE aliases (
        name TEXT PRIMARY KEY,
        digest TEXT NOT NULL,
        etag TEXT NOT NULL,
        update_time REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE alias_history (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        digest TEXT NOT NULL,
        etag TEXT NOT NULL,
        update_time REAL NOT NULL
    ) STRICT;
    CREATE INDEX alias_history_by_name ON alias_history (name, id);
    CREATE TABLE operations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL UNIQUE,
        payload TEXT NOT NULL,
        create_time REAL NOT NULL,
        outcome TEXT
    ) STRICT;
    """,
)
"""One script a version of the schema; `PRAGMA user_version` says how many have run."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A name, what it means, and the tag that changes with every move. An empty digest: deleted."""

    name: str
    digest: str
    etag: str
    update_time: float


@dataclass(frozen=True, slots=True)
class StoredOperation:
    """An operation as it is kept: `payload` is what was asked, `outcome` how it ended, both JSON."""

    name: str
    request_id: str
    payload: str
    create_time: float
    outcome: str | None


class Catalog:
    """The database; see the module's docstring."""

    def __init__(self, folder: Path) -> None:
        """Opens `<folder>/registry.db` and migrates it; raises FailedPrecondition when another has it."""
        self._lock = _own(folder / "registry.lock")
        try:
            self._db = sqlite3.connect(folder / "registry.db", isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._migrate()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Closes the database and lets another registry have it."""
        self._db.close()
        os.close(self._lock)

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise FailedPrecondition(
                f"the registry's database has version {version}, this release knows {len(_MIGRATIONS)}; "
                "use the newer release",
                reason="NEWER_DATABASE",
            )
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")

    def _one(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()

    # Artifacts

    def index(self, digests: Iterable[str]) -> None:
        """Makes the index what the store has."""
        with self._transaction():
            self._db.execute("DELETE FROM artifacts")
            self._db.executemany("INSERT INTO artifacts VALUES (?)", [(digest,) for digest in digests])

    def add_artifact(self, digest: str) -> None:
        """Adds one to the index."""
        self._db.execute("INSERT OR IGNORE INTO artifacts VALUES (?)", (digest,))

    def has_artifact(self, digest: str) -> bool:
        """Whether it is in the index."""
        return self._one("SELECT 1 FROM artifacts WHERE digest = ?", digest) is not None

    def artifacts(self, after: str, limit: int) -> list[str]:
        """Digests above `after`, in order."""
        query = "SELECT digest FROM artifacts WHERE digest > ? ORDER BY digest LIMIT ?"
        return [digest for (digest,) in self._db.execute(query, (after, limit))]

    def remove_artifact(self, digest: str) -> None:
        """Takes it out of the index; raises NotFound, and FailedPrecondition while aliases hold it."""
        with self._transaction():
            self._need_artifact(digest)
            rows = self._db.execute("SELECT name FROM aliases WHERE digest = ? ORDER BY name", (digest,))
            if names := [name for (name,) in rows]:
                raise FailedPrecondition(
                    f"the artifact is held by {len(names)} aliases: {', '.join(names[:10])}; "
                    "delete or move them first",
                    reason="ARTIFACT_IN_USE",
                    metadata={"aliases": ",".join(names[:10])},
                )
            self._db.execute("DELETE FROM artifacts WHERE digest = ?", (digest,))

    def _need_artifact(self, digest: str) -> None:
        if not self.has_artifact(digest):
            raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND")

    # Aliases

    def alias(self, name: str) -> Alias:
        """The alias; raises NotFound."""
        row = self._one("SELECT name, digest, etag, update_time FROM aliases WHERE name = ?", name)
        if row is None:
            raise NotFound(f"no alias {name!r}; list them with ListAliases", reason="MODEL_NOT_FOUND")
        return Alias(*row)

    def set_alias(self, name: str, digest: str, etag: str = "") -> Alias:
        """Creates or moves an alias; one that is there already stays as it is.

        Raises NotFound for an unknown artifact and Aborted when `etag` is given and is not the alias's.
        """
        with self._transaction():
            self._need_artifact(digest)
            current = self._current(name, etag)
            if current is not None and current.digest == digest:
                return current
            return self._record(name, digest)

    def delete_alias(self, name: str, etag: str = "") -> None:
        """Forgets an alias, but not its history; raises NotFound and Aborted."""
        with self._transaction():
            self.alias(name)
            self._current(name, etag)
            self._record(name, "")

    def _current(self, name: str, etag: str) -> Alias | None:
        try:
            current = self.alias(name)
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

    def aliases(self, after: str, limit: int) -> list[Alias]:
        """Aliases by name, above `after`."""
        query = "SELECT name, digest, etag, update_time FROM aliases WHERE name > ? ORDER BY name LIMIT ?"
        return [Alias(*row) for row in self._db.execute(query, (after, limit))]

    def alias_history(self, name: str, before: int, limit: int) -> list[tuple[int, Alias]]:
        """Where an alias has pointed, newest first, with numbers that fall; below `before`."""
        query = (
            "SELECT id, name, digest, etag, update_time FROM alias_history "
            "WHERE name = ? AND id < ? ORDER BY id DESC LIMIT ?"
        )
        return [(number, Alias(*row)) for number, *row in self._db.execute(query, (name, before, limit))]

    # Operations

    def add_operation(self, operation: StoredOperation) -> StoredOperation:
        """Keeps a new operation; its name and request_id must be new."""
        self._db.execute(
            "INSERT INTO operations (name, request_id, payload, create_time) VALUES (?, ?, ?, ?)",
            (operation.name, operation.request_id, operation.payload, operation.create_time),
        )
        return operation

    def operation_of_request(self, request_id: str) -> StoredOperation | None:
        """The operation that a request_id started."""
        row = self._one(_OPERATION + "WHERE request_id = ?", request_id)
        return None if row is None else StoredOperation(*row)

    def finish_operation(self, name: str, outcome: str) -> None:
        """Keeps how an operation ended."""
        self._db.execute("UPDATE operations SET outcome = ? WHERE name = ?", (outcome, name))

    def finish_unfinished(self, outcome: str) -> int:
        """Ends every operation that has no end; gives their number."""
        return self._db.execute(
            "UPDATE operations SET outcome = ? WHERE outcome IS NULL", (outcome,)
        ).rowcount

    def operation(self, name: str) -> StoredOperation:
        """The operation; raises NotFound."""
        row = self._one(_OPERATION + "WHERE name = ?", name)
        if row is None:
            raise NotFound(f"no operation {name!r}", reason="OPERATION_NOT_FOUND")
        return StoredOperation(*row)

    def operations(self, before: int, limit: int) -> list[tuple[int, StoredOperation]]:
        """Operations, newest first, with numbers that fall; below `before`."""
        rows = self._db.execute(
            "SELECT id, name, request_id, payload, create_time, outcome FROM operations "
            "WHERE id < ? ORDER BY id DESC LIMIT ?",
            (before, limit),
        )
        return [(number, StoredOperation(*row)) for number, *row in rows]

    def delete_operation(self, name: str) -> None:
        """Forgets an operation; raises NotFound."""
        self.operation(name)
        self._db.execute("DELETE FROM operations WHERE name = ?", (name,))

    def prune_operations(self, keep: int) -> None:
        """Forgets all but the newest `keep` that have ended."""
        self._db.execute(
            "DELETE FROM operations WHERE outcome IS NOT NULL AND id NOT IN "
            "(SELECT id FROM operations ORDER BY id DESC LIMIT ?)",
            (keep,),
        )

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


_OPERATION = "SELECT name, request_id, payload, create_time, outcome FROM operations "


class _Transaction:
    """BEGIN IMMEDIATE, and COMMIT or ROLLBACK."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _own(path: Path) -> int:
    """The lock that says which process is the registry of a store; it dies with its holder."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FailedPrecondition(
            f"another registry serves the store {path.parent}; stop it, or give another one in TREADLE_STORE",
            reason="STORE_IN_USE",
        ) from None
    return descriptor
