"""What is wanted under an alias and what is served, who holds models, what goes when room is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from treadle.client.artifact import Alias
from treadle.deployments import ServingConfiguration


@dataclass(frozen=True, slots=True)
class DeploymentTarget:
    """An artifact, how it is computed, and its share of the requests relative to the other target."""

    artifact_digest: str
    configuration: ServingConfiguration = field(default_factory=ServingConfiguration)
    weight: int = 1


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """How many workers have an artifact so configured, by what they do with it."""

    artifact_digest: str
    configuration: ServingConfiguration
    profile: str
    loading_workers: int
    ready_workers: int
    draining_workers: int
    failed_workers: int
    error: str = ""
    """Why one of them failed."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """One or two targets under an alias, which means the first.

    What is served, the workers' status, `settled` and `update_time` are the registry's to say.
    """

    alias: str
    targets: tuple[DeploymentTarget, ...]
    replicas: int = 1
    warm_up_prompts: tuple[str, ...] = ()
    serving: tuple[DeploymentTarget, ...] = ()
    status: tuple[TargetStatus, ...] = ()
    settled: bool = False
    etag: str = ""
    update_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Promotion:
    """An alias as it is now (None: it does not exist until a worker is ready), and what is rolled out."""

    alias: Alias | None
    deployment: Deployment | None


@dataclass(frozen=True, slots=True)
class ModelChange:
    """What a watch says: one change, or where the whole state begins (`reset`) and is `complete`."""

    version: str
    alias: Alias | None = None
    deleted_alias: str = ""
    deployment: Deployment | None = None
    deleted_deployment: str = ""
    reset: bool = False
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A hold on an artifact. `state` and `alias` are a worker's: "loading", "ready", "draining", "failed"."""

    lease_id: str
    artifact_digest: str
    holder: str
    expire_time: datetime
    state: str = ""
    alias: str = ""
    configuration: ServingConfiguration | None = None


@dataclass(frozen=True, slots=True)
class Eviction:
    """An artifact that goes, or is `kept`; `size` is what its going frees, in bytes."""

    artifact_digest: str
    size: int
    reason: str
    kept: bool
    last_use_time: datetime


@dataclass(frozen=True, slots=True)
class Evictions:
    """Every artifact, the least recently used first, and the store's bytes."""

    evictions: tuple[Eviction, ...]
    store_bytes_before: int
    store_bytes_after: int
