"""The registry's service: all areas of the contract as one."""

from __future__ import annotations

from treadle_registry.operations.operations import Operations
from treadle_registry.registry import Registry
from treadle_registry.servicing.alias_methods import AliasMethods
from treadle_registry.servicing.artifact_methods import ArtifactMethods


class RegistryServicer(ArtifactMethods, AliasMethods):
    """What is in no area yet answers UNIMPLEMENTED."""

    def __init__(self, registry: Registry, operations: Operations) -> None:
        self._registry, self._operations = registry, operations
