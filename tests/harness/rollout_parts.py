"""Deployments and leases over a real database, with a clock that a test turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from treadle_registry.catalog.catalog import Catalog
from treadle_registry.rollout.changes import Change
from treadle_registry.rollout.deploying import Deploying
from treadle_registry.rollout.deployment import Deployment, Target
from treadle_registry.rollout.lease import Configuration, Lease, Serving, ServingState
from treadle_registry.rollout.leasing import LeaseRequest, Leasing
from treadle_registry.rollout.rollouts import Rollouts

BFLOAT16, INT8 = Configuration("bfloat16"), Configuration("bfloat16", "int8")


def digest_of(number: int) -> str:
    """A digest that looks like one."""
    return f"sha256:{number:064x}"


class RolloutParts:
    """What changes aliases, deployments and leases; `restart` opens the database anew."""

    def __init__(self, folder: Path, digests: Iterable[str]) -> None:
        self.now = 1000.0
        self.changes: list[Change] = []
        self._folder, self._digests = folder, list(digests)
        self._open()

    def _open(self) -> None:
        self.catalog = Catalog(self._folder)
        self.catalog.artifacts.index(dict.fromkeys(self._digests, 1.0))
        self.rollouts = Rollouts(self.catalog, publish=self._publish, clock=lambda: self.now)
        self.deploying = Deploying(self.rollouts)
        self.leasing = Leasing(self.rollouts, lambda digest: f"compute of {digest}")

    def _publish(self, changes: Sequence[Change]) -> None:
        self.changes.extend(changes)

    def restart(self) -> None:
        """As after a death: what is in memory alone is lost."""
        self.catalog.close()
        self.changes.clear()
        self._open()

    def close(self) -> None:
        """Lets the database go."""
        self.catalog.close()

    def deploy(self, alias: str, *digests: str, replicas: int = 1, etag: str = "") -> None:
        """Wants targets of equal weight."""
        targets = tuple(Target(digest) for digest in digests)
        self.deploying.set_deployment(Deployment(alias, targets, replicas, etag=etag))

    def serving(self, alias: str) -> list[str]:
        """The digests that requests go to."""
        return [target.digest for target in self.deploying.get_deployment(alias).deployment.serving]

    def means(self, alias: str) -> str:
        """The digest that an alias means; empty: it does not exist."""
        found = self.rollouts.alias(alias)
        return found.digest if found else ""

    def lease(
        self,
        digest: str,
        alias: str,
        state: ServingState = ServingState.READY,
        *,
        holder: str = "worker",
        configuration: Configuration = BFLOAT16,
        time_to_live_s: float = 60.0,
    ) -> Lease:
        """A worker's lease."""
        serving = Serving(configuration, state, alias)
        return self.leasing.acquire(
            LeaseRequest(digest, holder, time_to_live_s=time_to_live_s, serving=serving)
        )

    def becomes(self, lease: Lease, state: ServingState) -> Lease:
        """The worker says what it does now."""
        assert lease.serving is not None
        serving = Serving(lease.serving.configuration, state, lease.alias)
        return self.leasing.renew(lease.lease_id, None, serving)
