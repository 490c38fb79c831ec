"""How far the workers are with what a deployment wants and serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from treadle.models.profile import ServingProfile
from treadle_registry.rollout.deployment import Deployment, Target
from treadle_registry.rollout.lease import Configuration, Failure, Lease, ServingState


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """Workers that have one artifact and configuration under an alias, by what they do with it."""

    digest: str
    configuration: Configuration
    profile: str
    """The id of the serving profile; empty while no worker says how it computes."""
    loading: int = 0
    ready: int = 0
    draining: int = 0
    failed: int = 0
    failure: Failure | None = None
    """Why one of them failed."""


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """A deployment, and how far the workers are with it."""

    deployment: Deployment
    status: tuple[TargetStatus, ...]


def view(deployment: Deployment, leases: Iterable[Lease]) -> DeploymentView:
    """What the live leases under the deployment's alias say; targets without a worker have a line, too."""
    groups: dict[tuple[str, Configuration], list[Lease]] = {}
    for lease in sorted(leases, key=lambda lease: lease.number):
        if lease.serving is not None:
            groups.setdefault((lease.digest, lease.serving.configuration), []).append(lease)
    lines = [_line(digest, how, group) for (digest, how), group in groups.items()]
    waiting: list[Target] = []
    for target in (*deployment.targets, *deployment.serving):
        known = any(target.fits(lease) for group in groups.values() for lease in group)
        if not known and not any(target.is_same(other) for other in waiting):
            waiting.append(target)
    lines += [TargetStatus(target.digest, target.configuration, "") for target in waiting]
    return DeploymentView(
        deployment, tuple(sorted(lines, key=lambda line: (line.digest, str(line.configuration))))
    )


def _line(digest: str, how: Configuration, leases: list[Lease]) -> TargetStatus:
    count = Counter(lease.state for lease in leases)
    failures = [lease.serving.failure for lease in leases if lease.serving and lease.serving.failure]
    profile = ServingProfile(leases[0].compute_digest, how.dtype, how.quantization, how.cache_dtype)
    return TargetStatus(
        digest,
        how,
        profile.id,
        loading=count[ServingState.LOADING],
        ready=count[ServingState.READY],
        draining=count[ServingState.DRAINING],
        failed=count[ServingState.FAILED],
        failure=failures[0] if failures else None,
    )
