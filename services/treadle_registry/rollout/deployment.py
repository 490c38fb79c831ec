"""Deployments: what is wanted under an alias, and what requests go to until that is there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from treadle_registry.rollout.lease import Configuration, Lease, ServingState

MOST_SERVED = 4
"""Targets that requests go to while what is wanted is not there; the oldest are dropped first."""


@dataclass(frozen=True, slots=True)
class Target:
    """An artifact, how it is computed, and its share of the requests relative to the others."""

    digest: str
    configuration: Configuration = field(default_factory=Configuration)
    weight: int = 1

    def fits(self, lease: Lease) -> bool:
        """Whether a worker's lease is for this target."""
        return (
            lease.serving is not None
            and lease.digest == self.digest
            and self.configuration.admits(lease.serving.configuration)
        )

    def is_same(self, other: Target) -> bool:
        """Whether the two differ in nothing but their weight."""
        return (self.digest, self.configuration) == (other.digest, other.configuration)

    def overlaps(self, other: Target) -> bool:
        """Whether one lease could fit both."""
        return self.digest == other.digest and self.configuration.overlaps(other.configuration)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One or two targets under an alias, which means the first; how many workers each; what is served.

    `etag` changes with what is wanted, `update_time` (seconds since 1970) also with what is served.
    """

    alias: str
    targets: tuple[Target, ...]
    replicas: int = 1
    warm_up_prompts: tuple[str, ...] = ()
    serving: tuple[Target, ...] = ()
    etag: str = ""
    update_time: float = 0.0

    @property
    def settled(self) -> bool:
        """Whether what is served is what is wanted."""
        return self.serving == self.targets

    def digests(self) -> set[str]:
        """Every artifact that is wanted or served."""
        return {target.digest for target in (*self.targets, *self.serving)}

    def target_of(self, lease: Lease) -> Target | None:
        """The target that a lease is for, wanted ones first; None: it is neither wanted nor served."""
        return next((target for target in (*self.targets, *self.serving) if target.fits(lease)), None)

    def to_json(self) -> str:
        """What is wanted and served, as it is stored."""
        return json.dumps(
            {
                "targets": [asdict(target) for target in self.targets],
                "replicas": self.replicas,
                "warm_up_prompts": self.warm_up_prompts,
                "serving": [asdict(target) for target in self.serving],
            }
        )

    @classmethod
    def from_json(cls, alias: str, etag: str, update_time: float, text: str) -> Deployment:
        """Reads what `to_json` wrote."""
        raw = json.loads(text)
        return cls(
            alias,
            _targets(raw["targets"]),
            raw["replicas"],
            tuple(raw["warm_up_prompts"]),
            _targets(raw["serving"]),
            etag,
            update_time,
        )


def _targets(raw: Iterable[dict[str, Any]]) -> tuple[Target, ...]:
    return tuple(
        Target(item["digest"], Configuration(**item["configuration"]), item["weight"]) for item in raw
    )


def advance(deployment: Deployment, leases: Iterable[Lease]) -> Deployment:
    """The deployment with what is served brought up to date; `leases` are the live ones under its alias.

    A wanted target joins once a worker is ready for it, and when all that get requests have joined they
    replace what was served before. What has joined stays, whatever happens to its workers.
    """
    ready = ready_leases(leases)
    # What is served without a weight may never have been ready.
    served = [target for target in deployment.serving if target.weight]
    wanted = [target for target in deployment.targets if target.weight]
    new = [target for target in wanted if not _is_among(target, served) and _fits_any(target, ready)]
    if all(_is_among(target, [*served, *new]) for target in wanted):
        return replace(deployment, serving=deployment.targets)
    stays = [target for target in deployment.serving if not _is_among(target, new)]
    return replace(deployment, serving=(*stays, *new)[-MOST_SERVED:])


def first_is_ready(deployment: Deployment, leases: Iterable[Lease]) -> bool:
    """Whether a worker is ready for what the alias is to mean."""
    return _fits_any(deployment.targets[0], ready_leases(leases))


def ready_leases(leases: Iterable[Lease]) -> list[Lease]:
    """Those whose workers are ready."""
    return [lease for lease in leases if lease.state is ServingState.READY]


def _is_among(target: Target, others: Iterable[Target]) -> bool:
    return any(target.is_same(other) for other in others)


def _fits_any(target: Target, leases: Iterable[Lease]) -> bool:
    return any(target.fits(lease) for lease in leases)
