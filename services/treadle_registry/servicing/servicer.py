"""The registry's service: all areas of the contract as one."""

from __future__ import annotations

from treadle_registry.eviction import Eviction
from treadle_registry.operations.operations import Operations
from treadle_registry.registry import Registry
from treadle_registry.servicing.alias_methods import AliasMethods
from treadle_registry.servicing.artifact_methods import ArtifactMethods
from treadle_registry.servicing.deployment_methods import DeploymentMethods
from treadle_registry.servicing.lease_methods import LeaseMethods
from treadle_registry.servicing.watch_methods import WatchMethods


class RegistryServicer(ArtifactMethods, AliasMethods, DeploymentMethods, LeaseMethods, WatchMethods):
    """What is in no area yet answers UNIMPLEMENTED."""

    def __init__(self, registry: Registry, operations: Operations, eviction: Eviction) -> None:
        self._registry, self._operations, self._eviction = registry, operations, eviction
