"""The live leases in memory, found by what one asks them for."""

from __future__ import annotations

import math
from collections.abc import Iterable

from treadle_registry.rollout.lease import Lease


class LeaseBook:
    """Leases by id, request, alias and artifact."""

    def __init__(self, leases: Iterable[Lease]) -> None:
        self._by_id: dict[str, Lease] = {}
        self._by_request: dict[str, str] = {}
        self._under: dict[str, dict[str, Lease]] = {}
        self._on: dict[str, dict[str, Lease]] = {}
        self.next_deadline = math.inf
        """No lease ends before; it may be that none ends then. For any thread."""
        for lease in leases:
            self.put(lease)

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, lease_id: str) -> Lease | None:
        """The lease of an id."""
        return self._by_id.get(lease_id)

    def of_request(self, request_id: str) -> Lease | None:
        """The lease that a request was given."""
        return self._by_id.get(self._by_request.get(request_id, ""))

    def under(self, alias: str) -> dict[str, Lease]:
        """Those of workers that serve an alias, by id."""
        return dict(self._under.get(alias, {}))

    def holders(self) -> dict[str, list[str]]:
        """Who holds each artifact."""
        return {digest: [lease.holder for lease in on.values()] for digest, on in self._on.items()}

    def lapsed(self, now: float) -> list[Lease]:
        """Those that have ended."""
        if now < self.next_deadline:
            return []
        self.next_deadline = min((lease.deadline for lease in self._by_id.values()), default=math.inf)
        return [lease for lease in self._by_id.values() if lease.deadline <= now]

    def page(self, after: int, limit: int, digest: str) -> list[Lease]:
        """Leases by number, above `after`; of one artifact, or with an empty digest of all."""
        leases = self._on.get(digest, {}) if digest else self._by_id
        found = [lease for lease in leases.values() if lease.number > after]
        return sorted(found, key=lambda lease: lease.number)[:limit]

    def put(self, lease: Lease) -> None:
        """Adds a lease, or replaces the one of its id."""
        self._by_id[lease.lease_id] = lease
        self._by_request[lease.request_id] = lease.lease_id
        self._on.setdefault(lease.digest, {})[lease.lease_id] = lease
        if lease.alias:
            self._under.setdefault(lease.alias, {})[lease.lease_id] = lease
        self.next_deadline = min(self.next_deadline, lease.deadline)

    def drop(self, lease: Lease) -> None:
        """Forgets a lease."""
        del self._by_id[lease.lease_id]
        del self._by_request[lease.request_id]
        for index, key in ((self._on, lease.digest), (self._under, lease.alias)):
            if leases := index.get(key):
                leases.pop(lease.lease_id, None)
                if not leases:
                    del index[key]
