"""Leases as they are kept, a row each. When one ends is not kept: a registry that starts anew cannot know."""

from __future__ import annotations

from treadle_registry.catalog.database import Database
from treadle_registry.rollout.lease import Lease, Serving

_READ = (
    "SELECT number, lease_id, request_id, digest, compute_digest, holder, time_to_live_s, serving "
    "FROM leases ORDER BY number"
)
_WRITE = (
    "INSERT OR REPLACE INTO leases "
    "(number, lease_id, request_id, digest, compute_digest, holder, time_to_live_s, serving) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)


class LeaseTable:
    """Leases by their number. Writes belong to the caller's transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def all(self, now: float) -> list[Lease]:
        """Every lease, as if it had been renewed at `now` (monotonic)."""
        return [
            Lease(
                lease_id,
                request_id,
                digest,
                compute_digest,
                holder,
                time_to_live_s,
                Serving.from_json(serving) if serving else None,
                now + time_to_live_s,
                number,
            )
            for (
                number,
                lease_id,
                request_id,
                digest,
                compute_digest,
                holder,
                time_to_live_s,
                serving,
            ) in self._db.execute(_READ)
        ]

    def next_number(self) -> int:
        """The number of the next lease: above every one that ever was."""
        row = self._db.one("SELECT seq FROM sqlite_sequence WHERE name = 'leases'")
        return int(row[0]) + 1 if row else 1

    def write(self, lease: Lease) -> None:
        """Keeps a lease in place of the one of its number."""
        self._db.execute(
            _WRITE,
            (
                lease.number,
                lease.lease_id,
                lease.request_id,
                lease.digest,
                lease.compute_digest,
                lease.holder,
                lease.time_to_live_s,
                lease.serving.to_json() if lease.serving else None,
            ),
        )

    def delete(self, number: int) -> None:
        """Forgets one."""
        self._db.execute("DELETE FROM leases WHERE number = ?", (number,))
