"""Between plans and inspections and the contract's messages."""

from __future__ import annotations

from treadle.api.registry.v1 import inspection_pb2, planning_pb2
from treadle.errors import invalid_field
from treadle.models.device_map_check import PlacedModel
from treadle.models.memory_estimate import MemoryEstimate
from treadle.rpc import to_status
from treadle_registry.formats.inspection import Inspection
from treadle_registry.formats.quantized_checkpoint import QuantizedCheckpoint
from treadle_registry.planning import PlacementRequest, Strategy, TrainingPlan
from treadle_registry.servicing.convert import facts_to_proto, task_facts_to_proto

_STRATEGIES: dict[int, Strategy] = {
    planning_pb2.DEVICE_MAP_STRATEGY_UNSPECIFIED: "auto",
    planning_pb2.DEVICE_MAP_STRATEGY_AUTO: "auto",
    planning_pb2.DEVICE_MAP_STRATEGY_BALANCED: "balanced",
    planning_pb2.DEVICE_MAP_STRATEGY_BALANCED_LOW_0: "balanced_low_0",
    planning_pb2.DEVICE_MAP_STRATEGY_SEQUENTIAL: "sequential",
}


def training_from_proto(request: planning_pb2.EstimateMemoryRequest) -> TrainingPlan | None:
    """How the model is trained; None where it is served, and then InvalidArgument for words of training."""
    if request.training:
        return TrainingPlan(request.gradient_checkpointing, request.lora_rank)
    if request.gradient_checkpointing or request.lora_rank:
        field = "lora_rank" if request.lora_rank else "gradient_checkpointing"
        raise invalid_field(field, "belongs to training; set training, or leave it out")
    return None


def placement_from_proto(request: planning_pb2.PlanDeviceMapRequest) -> PlacementRequest:
    """What is asked of the planner; raises InvalidArgument for a strategy that is none."""
    strategy = _STRATEGIES.get(request.strategy)
    if strategy is None:
        raise invalid_field("strategy", f"{request.strategy} is none of the contract's")
    return PlacementRequest(
        strategy, dict(request.free_memory), dict(request.max_memory), dict(request.device_map)
    )


def estimate_to_proto(estimate: MemoryEstimate) -> planning_pb2.EstimateMemoryResponse:
    """Bytes by what they are for."""
    return planning_pb2.EstimateMemoryResponse(
        weight_bytes=estimate.weight_bytes,
        cache_bytes=estimate.cache_bytes,
        activation_bytes=estimate.activation_bytes,
        gradient_bytes=estimate.gradient_bytes,
        optimizer_bytes=estimate.optimizer_bytes,
        total_bytes=estimate.total_bytes,
        parameters=estimate.parameters,
        trained_parameters=estimate.trained_parameters,
    )


def placed_to_proto(placed: PlacedModel) -> planning_pb2.PlanDeviceMapResponse:
    """A device map."""
    return planning_pb2.PlanDeviceMapResponse(
        device_map=placed.device_map, used_bytes=placed.used_bytes, warnings=placed.warnings
    )


def inspection_to_proto(inspection: Inspection) -> inspection_pb2.InspectModelResponse:
    """What a model is."""
    found = inspection.quantization
    return inspection_pb2.InspectModelResponse(
        facts=facts_to_proto(inspection.facts),
        format=inspection.format,
        files=[inspection_pb2.InspectedFile(path=name, bytes=size) for name, size in inspection.files],
        total_bytes=inspection.total_bytes,
        quantization=_quantization(found) if found else None,
        refusal=to_status(inspection.refusal) if inspection.refusal else None,
        task_facts=task_facts_to_proto(inspection.task_facts) if inspection.task_facts else None,
    )


def _quantization(found: QuantizedCheckpoint) -> inspection_pb2.CheckpointQuantization:
    return inspection_pb2.CheckpointQuantization(
        method=found.method,
        format=found.format,
        bits=found.bits,
        group_size=found.group_size,
        strategy=found.strategy,
        symmetric=found.symmetric,
        activation_order=found.activation_order,
        activation_bits=found.activation_bits,
        ignored_modules=found.ignored_modules,
        quantized_parameters=found.quantized_parameters,
        unquantized_parameters=found.unquantized_parameters,
        summary=found.summary,
    )
