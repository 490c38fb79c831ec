"""The registry's service: all areas of the contract as one."""

from __future__ import annotations

from treadle_registry.eviction import Eviction
from treadle_registry.operations.inspections import Inspections
from treadle_registry.operations.operations import Operations
from treadle_registry.planning import Planner
from treadle_registry.registry import Registry
from treadle_registry.servicing.alias_methods import AliasMethods
from treadle_registry.servicing.artifact_methods import ArtifactMethods
from treadle_registry.servicing.deployment_methods import DeploymentMethods
from treadle_registry.servicing.derivation_methods import DerivationMethods
from treadle_registry.servicing.lease_methods import LeaseMethods
from treadle_registry.servicing.planning_methods import PlanningMethods
from treadle_registry.servicing.transfer_methods import TransferMethods
from treadle_registry.servicing.watch_methods import WatchMethods
from treadle_registry.transfers import Transfers


class RegistryServicer(
    ArtifactMethods,
    DerivationMethods,
    AliasMethods,
    DeploymentMethods,
    LeaseMethods,
    WatchMethods,
    PlanningMethods,
    TransferMethods,
):
    """Every method of the contract, from the area that it belongs to."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        eviction: Eviction,
        inspections: Inspections,
        planner: Planner,
        transfers: Transfers,
    ) -> None:
        self._registry, self._operations, self._eviction = registry, operations, eviction
        self._inspections, self._planner, self._transfers = inspections, planner, transfers
