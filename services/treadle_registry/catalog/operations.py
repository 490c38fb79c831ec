"""Operations as they are kept."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.errors import NotFound
from treadle_registry.catalog.database import Database


@dataclass(frozen=True, slots=True)
class StoredOperation:
    """An operation as it is kept: `payload` is what was asked, `outcome` how it ended, both JSON."""

    name: str
    request_id: str
    payload: str
    create_time: float
    outcome: str | None


_OPERATION = "SELECT name, request_id, payload, create_time, outcome FROM operations "


class OperationTable:
    """Operations by name, by request_id, and newest first."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, operation: StoredOperation) -> StoredOperation:
        """Keeps a new operation; its name and request_id must be new."""
        self._db.execute(
            "INSERT INTO operations (name, request_id, payload, create_time) VALUES (?, ?, ?, ?)",
            (operation.name, operation.request_id, operation.payload, operation.create_time),
        )
        return operation

    def of_request(self, request_id: str) -> StoredOperation | None:
        """The operation that a request_id started."""
        row = self._db.one(_OPERATION + "WHERE request_id = ?", request_id)
        return None if row is None else StoredOperation(*row)

    def finish(self, name: str, outcome: str) -> None:
        """Keeps how an operation ended."""
        self._db.execute("UPDATE operations SET outcome = ? WHERE name = ?", (outcome, name))

    def finish_unfinished(self, outcome: str) -> int:
        """Ends every operation that has no end; gives their number."""
        return self._db.execute(
            "UPDATE operations SET outcome = ? WHERE outcome IS NULL", (outcome,)
        ).rowcount

    def get(self, name: str) -> StoredOperation:
        """The operation; raises NotFound."""
        row = self._db.one(_OPERATION + "WHERE name = ?", name)
        if row is None:
            raise NotFound(f"no operation {name!r}", reason="OPERATION_NOT_FOUND")
        return StoredOperation(*row)

    def page(self, before: int, limit: int) -> list[tuple[int, StoredOperation]]:
        """Operations, newest first, with numbers that fall; below `before`."""
        rows = self._db.execute(
            "SELECT id, name, request_id, payload, create_time, outcome FROM operations "
            "WHERE id < ? ORDER BY id DESC LIMIT ?",
            (before, limit),
        )
        return [(number, StoredOperation(*row)) for number, *row in rows]

    def delete(self, name: str) -> None:
        """Forgets an operation; raises NotFound."""
        self.get(name)
        self._db.execute("DELETE FROM operations WHERE name = ?", (name,))

    def prune(self, keep: int) -> None:
        """Forgets all but the newest `keep` that have ended."""
        self._db.execute(
            "DELETE FROM operations WHERE outcome IS NOT NULL AND id NOT IN "
            "(SELECT id FROM operations ORDER BY id DESC LIMIT ?)",
            (keep,),
        )
