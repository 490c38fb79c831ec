"""A registry in this process, as a worker sees it: artifacts, leases, and what the test says is deployed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from treadle.api.registry.v1 import deployment_pb2, registry_pb2
from treadle.errors import NotFound, ResourceExhausted, Unavailable
from treadle_worker.jobs import Artifact
from treadle_worker.models.leases import KnownLease, Served

Change = registry_pb2.WatchModelsResponse


@dataclass
class FakeRegistry:
    """Keeps no time: leases last until they are released, or `lapse`."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """By name or digest."""
    aliases: dict[str, str] = field(default_factory=dict)
    deployments: dict[str, deployment_pb2.Deployment] = field(default_factory=dict)
    away: bool = False
    given: dict[str, Served] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, str, str]] = field(default_factory=list)
    """(digest, alias, state) of every acquisition and renewal that says something else than before."""
    num_acquired: int = 0
    _changes: list[Change] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def _up(self) -> None:
        if self.away:
            raise Unavailable("away", reason="SERVICE_AWAY")

    async def resolve(self, model: str) -> Artifact:
        self._up()
        digest = self.aliases.get(model, model)
        if digest not in self.artifacts:
            raise NotFound(f"no {model}")
        return self.artifacts[digest]

    def state_of(self, digest: str) -> list[str]:
        """What the leases of an artifact say."""
        return sorted(served.state for served in self.given.values() if served.artifact_digest == digest)

    async def acquire_lease(
        self, request_id: str, served: Served, *, holder: str, time_to_live_s: float
    ) -> str:
        self._up()
        deployment = self.deployments.get(served.alias)
        same = [
            one
            for one in self.given.values()
            if (one.artifact_digest, one.alias) == (served.artifact_digest, served.alias)
        ]
        if deployment is not None and len(same) >= (deployment.replicas or 1):
            raise ResourceExhausted("all replicas are taken", reason="REPLICAS_TAKEN")
        self.num_acquired += 1
        lease_id = f"lease-{self.num_acquired}"
        self.holders[lease_id] = holder
        self._say(lease_id, served)
        return lease_id

    async def renew_lease(self, lease_id: str, served: Served, *, time_to_live_s: float) -> None:
        self._up()
        if lease_id not in self.given:
            raise NotFound("lapsed", reason="LEASE_NOT_FOUND")
        self._say(lease_id, served)

    def _say(self, lease_id: str, served: Served) -> None:
        before = self.given.get(lease_id)
        self.given[lease_id] = served
        if before is None or before.state != served.state:
            self.told.append((served.artifact_digest, served.alias, served.state))

    async def release_lease(self, lease_id: str) -> None:
        self._up()
        self.given.pop(lease_id, None)

    async def leases(self, artifact_digest: str) -> list[KnownLease]:
        self._up()
        return [
            KnownLease(lease_id, served.alias, served.configuration, served.state)
            for lease_id, served in self.given.items()
            if served.artifact_digest == artifact_digest
        ]

    def lapse(self) -> None:
        """Every lease is over."""
        self.given.clear()

    def point(self, alias: str, digest: str) -> None:
        """Moves an alias."""
        self.aliases[alias] = digest
        self._tell(Change(alias={"name": alias, "artifact_digest": digest}))

    def deploy(self, alias: str, targets: list[str], serving: list[str], replicas: int = 1, **fields) -> None:
        """Sets an alias's deployment; targets are digests, or messages."""
        self.deployments[alias] = deployment_pb2.Deployment(
            alias=alias,
            targets=[_target(one) for one in targets],
            serving=[_target(one) for one in serving],
            replicas=replicas,
            **fields,
        )
        self._tell(Change(deployment=self.deployments[alias]))

    def withdraw(self, alias: str) -> None:
        """Deletes an alias's deployment."""
        del self.deployments[alias]
        self._tell(Change(deleted_deployment=alias))

    def _tell(self, change: Change) -> None:
        self._changes.append(change)
        self._changed.set()

    async def watch(self, version: str) -> AsyncIterator[Change]:
        """The whole state, then what changes, until the registry is away."""
        self._up()
        seen = len(self._changes)
        yield Change(reset=True)
        for name, digest in list(self.aliases.items()):
            yield Change(alias={"name": name, "artifact_digest": digest})
        for deployment in list(self.deployments.values()):
            yield Change(deployment=deployment)
        yield Change(complete=True, version=str(seen))
        while True:
            self._up()
            for change in self._changes[seen:]:
                seen += 1
                yield Change(version=str(seen), **{change.WhichOneof("change"): _body(change)})
            self._changed.clear()
            if seen == len(self._changes):
                await self._changed.wait()

    def leave(self) -> None:
        """The registry goes away, and cuts its watches."""
        self.away = True
        self._changed.set()


def _target(target: object) -> deployment_pb2.DeploymentTarget:
    if isinstance(target, deployment_pb2.DeploymentTarget):
        return target
    return deployment_pb2.DeploymentTarget(artifact_digest=str(target))


def _body(change: Change) -> object:
    return getattr(change, change.WhichOneof("change"))
