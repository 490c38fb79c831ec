"""The registry's service: all areas of the contract as one."""

from __future__ import annotations

from treadle_registry.operations.operations import Operations
from treadle_registry.registry import Registry
from treadle_registry.servicing.alias_methods import AliasMethods
from treadle_registry.servicing.artifact_methods import ArtifactMethods
from treadle_registry.servicing.transfer_methods import TransferMethods
from treadle_registry.transfers import Transfers


class RegistryServicer(ArtifactMethods, AliasMethods, TransferMethods):
    """What is in no area yet answers UNIMPLEMENTED."""

    def __init__(self, registry: Registry, operations: Operations, transfers: Transfers) -> None:
        self._registry, self._operations, self._transfers = registry, operations, transfers
