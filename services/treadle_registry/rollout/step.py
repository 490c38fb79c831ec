"""What one call changes of aliases, deployments and leases, before any of it is written."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from treadle_registry.catalog.aliases import Alias, moved
from treadle_registry.rollout.deployment import Deployment, advance, first_is_ready
from treadle_registry.rollout.lease import Lease


class Base(Protocol):
    """What was committed last."""

    def alias(self, name: str) -> Alias | None:
        """The alias of a name."""

    def deployment(self, alias: str) -> Deployment | None:
        """The deployment under an alias."""

    def leases_under(self, alias: str) -> dict[str, Lease]:
        """The leases of workers that serve an alias, by id."""


class Step:
    """Reads through what it has changed to what was committed; `Rollouts` commits it whole or not at all."""

    def __init__(self, base: Base, lapsed: Iterable[Lease] = ()) -> None:
        self._base = base
        self.aliases: dict[str, Alias] = {}
        """With an empty digest: deleted."""
        self.deployments: dict[str, Deployment | None] = {}
        """None: deleted."""
        self.leases: dict[str, Lease] = {}
        self.dropped: dict[str, Lease] = {lease.lease_id: lease for lease in lapsed}
        self.renewed: dict[str, Lease] = {}
        """Leases that last longer and are else as they were: that is not written."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.aliases or self.deployments or self.leases or self.dropped)

    def alias(self, name: str) -> Alias | None:
        """The alias of a name."""
        alias = self.aliases.get(name) or self._base.alias(name)
        return alias if alias is not None and alias.digest else None

    def deployment(self, alias: str) -> Deployment | None:
        """The deployment under an alias."""
        return self.deployments[alias] if alias in self.deployments else self._base.deployment(alias)

    def leases_under(self, alias: str) -> list[Lease]:
        """The live leases of workers that serve an alias, the oldest first."""
        found = self._base.leases_under(alias) | {
            lease_id: lease for lease_id, lease in self.leases.items() if lease.alias == alias
        }
        live = [lease for lease_id, lease in found.items() if lease_id not in self.dropped]
        return sorted(live, key=lambda lease: lease.number)

    def move(self, name: str, digest: str) -> Alias:
        """Points an alias at an artifact; an empty digest deletes it."""
        self.aliases[name] = moved(name, digest)
        return self.aliases[name]

    def want(self, deployment: Deployment) -> None:
        """Puts what is wanted in place of what was, and brings what is served up to date."""
        self.deployments[deployment.alias] = replace(
            deployment, etag=secrets.token_hex(8), update_time=time.time()
        )
        self.settle(deployment.alias)

    def settle(self, alias: str) -> None:
        """Brings what a deployment serves, and what its alias means, up to date with the leases."""
        deployment = self.deployment(alias)
        if deployment is None:
            return
        leases = self.leases_under(alias)
        advanced = advance(deployment, leases)
        if advanced != deployment:
            self.deployments[alias] = replace(advanced, update_time=time.time())
        current, first = self.alias(alias), deployment.targets[0].digest
        if (current is None or current.digest != first) and first_is_ready(deployment, leases):
            self.move(alias, first)
