"""The registry's service: all areas of the contract as one."""

from __future__ import annotations

from treadle_registry.operations.inspections import Inspections
from treadle_registry.operations.operations import Operations
from treadle_registry.planning import Planner
from treadle_registry.registry import Registry
from treadle_registry.servicing.alias_methods import AliasMethods
from treadle_registry.servicing.artifact_methods import ArtifactMethods
from treadle_registry.servicing.planning_methods import PlanningMethods


class RegistryServicer(ArtifactMethods, AliasMethods, PlanningMethods):
    """What is in no area yet answers UNIMPLEMENTED."""

    def __init__(
        self, registry: Registry, operations: Operations, inspections: Inspections, planner: Planner
    ) -> None:
        self._registry, self._operations = registry, operations
        self._inspections, self._planner = inspections, planner
