"""Aliases, deployments and leases as one, each change of them committed whole and then told.

All of it runs in the registry's thread, one call after another: an artifact cannot be deleted while a lease
on it is given, and an alias moves in the same transaction as the lease that says that a worker is ready.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

from treadle_registry.catalog.aliases import Alias
from treadle_registry.catalog.catalog import Catalog
from treadle_registry.rollout.changes import Change
from treadle_registry.rollout.deployment import Deployment
from treadle_registry.rollout.lease import Lease
from treadle_registry.rollout.lease_book import LeaseBook
from treadle_registry.rollout.status import DeploymentView, view
from treadle_registry.rollout.step import Step


class Rollouts:
    """The memory's copy of what the catalog has of them; `publish` hears of every change."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        publish: Callable[[Sequence[Change]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog, self.clock, self._publish = catalog, clock, publish
        self.asked_at = math.inf
        """When the call that runs now was made (monotonic): who asked in time is not too late because others
        were before."""
        self.book = LeaseBook(catalog.leases.all(clock()))
        self._next_number = catalog.leases.next_number()
        self._deployments = {deployment.alias: deployment for deployment in catalog.deployments.all()}
        self._views = {alias: self._look(deployment) for alias, deployment in self._deployments.items()}
        publish(
            [
                *(Change("alias", alias.name, alias) for alias in catalog.aliases.all()),
                *(Change("deployment", name, seen) for name, seen in self._views.items()),
            ]
        )

    def alias(self, name: str) -> Alias | None:
        """The alias of a name."""
        return self.catalog.aliases.find(name)

    def deployment(self, alias: str) -> Deployment | None:
        """The deployment under an alias."""
        return self._deployments.get(alias)

    def leases_under(self, alias: str) -> dict[str, Lease]:
        """The leases of workers that serve an alias, by id."""
        return self.book.under(alias)

    def view(self, alias: str) -> DeploymentView | None:
        """The deployment under an alias, with how far the workers are."""
        return self._views.get(alias)

    def views(self, after: str, limit: int) -> list[DeploymentView]:
        """Deployments by alias, above `after`."""
        return [self._views[alias] for alias in sorted(self._views) if alias > after][:limit]

    def number(self) -> int:
        """A number for a lease, above every one that was given."""
        self._next_number += 1
        return self._next_number - 1

    def held(self) -> dict[str, list[str]]:
        """Why artifacts must stay, each with all reasons, for people."""
        reasons: dict[str, list[str]] = {}
        for alias in self.catalog.aliases.all():
            reasons.setdefault(alias.digest, []).append(f"aliased as {alias.name}")
        for deployment in self._deployments.values():
            for digest in deployment.digests():
                reasons.setdefault(digest, []).append(f"deployed under {deployment.alias}")
        for digest, holders in self.book.holders().items():
            reasons.setdefault(digest, []).extend(f"leased by {holder}" for holder in holders)
        return reasons

    @contextlib.contextmanager
    def step(self) -> Iterator[Step]:
        """What the block changes is committed at its end, with the ends of leases that have lapsed."""
        step = Step(self, self.book.lapsed(min(self.clock(), self.asked_at)))
        yield step
        self._commit(step)

    def _commit(self, step: Step) -> None:
        catalog = self.catalog
        if not step.is_empty:
            with catalog.database.transaction():
                for lease in step.dropped.values():
                    catalog.leases.delete(lease.number)
                for lease in step.leases.values():
                    catalog.leases.write(lease)
                for name, deployment in step.deployments.items():
                    if deployment is None:
                        catalog.deployments.delete(name)
                    else:
                        catalog.deployments.write(deployment)
                for alias in step.aliases.values():
                    catalog.aliases.write(alias)
        self._remember(step)

    def _remember(self, step: Step) -> None:
        """Takes what was committed into memory, and tells of it."""
        touched = {lease.alias for lease in (*step.dropped.values(), *step.leases.values())}
        for lease in step.dropped.values():
            self.book.drop(lease)
        for lease in (*step.leases.values(), *step.renewed.values()):
            self.book.put(lease)
        for name, deployment in step.deployments.items():
            if deployment is None:
                self._deployments.pop(name, None)
            else:
                self._deployments[name] = deployment
        for alias in step.aliases.values():
            self.catalog.aliases.remember(alias)
        changes = [
            Change("alias", alias.name, alias if alias.digest else None) for alias in step.aliases.values()
        ]
        changes += self._changed_views(touched | step.deployments.keys())
        if changes:
            self._publish(changes)

    def _changed_views(self, aliases: set[str]) -> Iterator[Change]:
        for alias in sorted(aliases):
            deployment = self._deployments.get(alias)
            seen = None if deployment is None else self._look(deployment)
            if seen == self._views.get(alias):
                continue
            if seen is None:
                del self._views[alias]
            else:
                self._views[alias] = seen
            yield Change("deployment", alias, seen)

    def _look(self, deployment: Deployment) -> DeploymentView:
        return view(deployment, self.book.under(deployment.alias).values())
