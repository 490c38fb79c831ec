"""The database: SQLite in WAL mode at `<store>/registry.db`, its schema, its lock.

One writer for good: the registry that holds the lock beside it. All of it blocks: the registry calls it in a
thread of its own.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from treadle.durable_names import fsync_folder
from treadle.errors import FailedPrecondition

logger = logging.getLogger(__name__)

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
    """
    CREATE TABLE deployments (
        alias TEXT PRIMARY KEY,
        etag TEXT NOT NULL,
        update_time REAL NOT NULL,
        state TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE leases (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        lease_id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL UNIQUE,
        digest TEXT NOT NULL,
        compute_digest TEXT NOT NULL,
        holder TEXT NOT NULL,
        time_to_live_s REAL NOT NULL,
        serving TEXT
    ) STRICT;
    ALTER TABLE artifacts ADD COLUMN last_use_time REAL NOT NULL DEFAULT 0;
    """,
)
"""One script a version of the schema; `PRAGMA user_version` says how many have run."""


class Database:
    """An open database, and the lock that makes it this process's."""

    def __init__(self, folder: Path) -> None:
        """Opens `<folder>/registry.db` and migrates it, an older one after a backup of it.

        Raises FailedPrecondition when another has it (STORE_IN_USE) or it is a newer release's
        (NEWER_DATABASE).
        """
        self._lock = _own(folder / "registry.lock")
        try:
            self._path = folder / "registry.db"
            self.db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = FULL")
            self._migrate()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Closes the database and lets another registry have it."""
        self.db.close()
        os.close(self._lock)

    def _migrate(self) -> None:
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise FailedPrecondition(
                f"the registry's database has version {version}, this release knows {len(_MIGRATIONS)}; "
                "use the newer release",
                reason="NEWER_DATABASE",
            )
        if version == len(_MIGRATIONS):
            return
        if version:
            self._back_up(version)
        scripts = " ".join(_MIGRATIONS[version:])
        self.db.executescript(f"BEGIN IMMEDIATE; {scripts} PRAGMA user_version = {len(_MIGRATIONS)}; COMMIT;")
        if version:
            logger.warning("the database was migrated", extra={"from": version, "to": len(_MIGRATIONS)})

    def _back_up(self, version: int) -> None:
        """Writes `registry.db.v<N>.bak`: the database as it is, whole or not at all."""
        target = self._path.with_name(f"{self._path.name}.v{version}.bak")
        aside = target.with_name(f"{target.name}.new")
        for left in (aside, *(aside.with_name(aside.name + end) for end in ("-journal", "-wal", "-shm"))):
            left.unlink(missing_ok=True)
        copy = sqlite3.connect(aside)
        try:
            self.db.backup(copy)
            # A file that stands for itself: whoever puts it back need know of no log beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()
        descriptor = os.open(aside, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        aside.rename(target)
        fsync_folder(target.parent)

    def execute(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """One statement."""
        return self.db.execute(query, values)

    def executemany(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement for each row."""
        self.db.executemany(query, rows)

    def one(self, query: str, *values: Any) -> Any:
        """The first row, or None."""
        return self.db.execute(query, values).fetchone()

    def transaction(self) -> Transaction:
        """A block that is done whole or not at all; blocks do not nest."""
        return Transaction(self.db)


class Transaction:
    """BEGIN IMMEDIATE, and COMMIT or ROLLBACK."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            # Also a commit that failed, as on a full disk, must leave nothing open.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


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
