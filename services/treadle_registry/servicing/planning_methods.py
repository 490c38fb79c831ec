"""Inspection and planning: what a model is, what it takes, and where its parts go."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from treadle.api.registry.v1 import inspection_pb2, planning_pb2, registry_pb2_grpc
from treadle_registry.operations.inspections import Inspections
from treadle_registry.planning import Planner
from treadle_registry.servicing.convert_operations import looked_at_from_proto
from treadle_registry.servicing.convert_planning import (
    estimate_to_proto,
    inspection_to_proto,
    placed_to_proto,
    placement_from_proto,
    training_from_proto,
)
from treadle_registry.servicing.convert_rollout import configuration_from_proto


class PlanningMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Reads headers and configurations, and loads nothing."""

    _inspections: Inspections
    _planner: Planner

    async def InspectModel(
        self, request: inspection_pb2.InspectModelRequest, context: object
    ) -> inspection_pb2.InspectModelResponse:
        """What a model is, from headers alone."""
        if request.WhichOneof("source") == "model":
            return inspection_to_proto(await self._inspections.inspect_model(request.model))
        return inspection_to_proto(await self._inspections.inspect_source(looked_at_from_proto(request)))

    async def EstimateMemory(
        self, request: planning_pb2.EstimateMemoryRequest, context: object
    ) -> planning_pb2.EstimateMemoryResponse:
        """Bytes that a model takes."""
        return estimate_to_proto(
            await self._planner.estimate(
                request.model,
                configuration_from_proto(request.configuration),
                request.context_length,
                request.batch_size,
                training_from_proto(request),
            )
        )

    async def PlanDeviceMap(
        self, request: planning_pb2.PlanDeviceMapRequest, context: object
    ) -> planning_pb2.PlanDeviceMapResponse:
        """Which module goes to which device."""
        configuration = configuration_from_proto(request.configuration)
        return placed_to_proto(
            await self._planner.place(request.model, configuration, placement_from_proto(request))
        )
