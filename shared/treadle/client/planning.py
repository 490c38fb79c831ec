"""What models are, what they take and where their parts go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from google.rpc import status_pb2

from treadle.api.registry.v1 import inspection_pb2, planning_pb2
from treadle.client.artifact import DtypeShare, ModelSource, TaskFacts
from treadle.client.convert_artifact import dtypes_from_proto, set_source, task_facts_from_proto
from treadle.client.deployment_convert import configuration_to_proto
from treadle.client.registry_connection import RegistryConnection
from treadle.deployments import ServingConfiguration
from treadle.errors import TreadleError, invalid_field
from treadle.rpc import from_status

Strategy = Literal["auto", "balanced", "balanced_low_0", "sequential"]
_INSPECT_S = 150.0
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class CheckpointQuantization:
    """How somebody quantised a checkpoint's weights; `summary` says it in a line."""

    method: str
    format: str
    bits: int
    group_size: int
    strategy: str
    symmetric: bool
    activation_order: bool
    activation_bits: int
    ignored_modules: tuple[str, ...]
    quantized_parameters: int
    unquantized_parameters: int
    summary: str


@dataclass(frozen=True, slots=True)
class ModelInspection:
    """What a model is; `refusal` says why it cannot be imported, None: it can."""

    model_type: str
    architecture: str
    parameters: int
    vocab_size: int
    context_length: int
    hidden_size: int
    num_layers: int
    license: str
    has_chat_template: bool
    dtypes: tuple[DtypeShare, ...]
    format: str
    files: Mapping[str, int]
    """Bytes by name."""
    total_bytes: int
    quantization: CheckpointQuantization | None
    refusal: TreadleError | None
    task_facts: TaskFacts | None = None
    """What can be asked of it; None where it cannot be imported."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    total_bytes: int
    parameters: int
    trained_parameters: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Module to device ("" is the whole model), what that puts on each device, and what should be known."""

    device_map: Mapping[str, str]
    used_bytes: Mapping[str, int]
    warnings: tuple[str, ...]


AS_THE_WORKER_HAS_IT = ServingConfiguration()
"""Nothing is said: its defaults."""


class PlanningMethods(RegistryConnection):
    """Inspection and planning; see RegistryClient."""

    async def inspect(self, source: ModelSource | str) -> ModelInspection:
        """What a model is, from headers alone: of a source, or of an alias or digest of the store."""
        request = inspection_pb2.InspectModelRequest()
        if isinstance(source, str):
            request.model = source
        else:
            set_source(request, source)
        response = await self._call(lambda _: self._stub.InspectModel(request, timeout=_INSPECT_S))
        return _inspection_from_proto(response)

    async def estimate_memory(
        self,
        model: str,
        configuration: ServingConfiguration = AS_THE_WORKER_HAS_IT,
        *,
        context_length: int = 0,
        batch_size: int = 0,
        training: bool = False,
        gradient_checkpointing: bool = False,
        lora_rank: int = 0,
    ) -> MemoryEstimate:
        """Bytes that a model takes; 0 for the context is the model's, for the batch one, for the rank no."""
        request = planning_pb2.EstimateMemoryRequest(
            model=model,
            configuration=configuration_to_proto(configuration),
            context_length=_unsigned("context_length", context_length),
            batch_size=_unsigned("batch_size", batch_size),
            training=training,
            gradient_checkpointing=gradient_checkpointing,
            lora_rank=_unsigned("lora_rank", lora_rank),
        )
        response = await self._call(lambda left_s: self._stub.EstimateMemory(request, timeout=left_s))
        return MemoryEstimate(
            weight_bytes=response.weight_bytes,
            cache_bytes=response.cache_bytes,
            activation_bytes=response.activation_bytes,
            gradient_bytes=response.gradient_bytes,
            optimizer_bytes=response.optimizer_bytes,
            total_bytes=response.total_bytes,
            parameters=response.parameters,
            trained_parameters=response.trained_parameters,
        )

    async def plan_device_map(
        self,
        model: str,
        configuration: ServingConfiguration = AS_THE_WORKER_HAS_IT,
        *,
        strategy: Strategy = "auto",
        free_memory: Mapping[str, int] | None = None,
        max_memory: Mapping[str, str] | None = None,
        device_map: Mapping[str, str] | None = None,
    ) -> DevicePlan:
        """Which module goes to which device.

        `free_memory` is what devices have, in bytes, `max_memory` what may be used of them, as in
        {"0": "10GiB", "cpu": "64GB"}; with `device_map` that map is checked.
        """
        request = planning_pb2.PlanDeviceMapRequest(
            model=model,
            configuration=configuration_to_proto(configuration),
            strategy=planning_pb2.DeviceMapStrategy.Value(f"DEVICE_MAP_STRATEGY_{strategy.upper()}"),
            free_memory=free_memory,
            max_memory=max_memory,
            device_map=device_map,
        )
        response = await self._call(lambda left_s: self._stub.PlanDeviceMap(request, timeout=left_s))
        return DevicePlan(
            _in_order(response.device_map), _in_order(response.used_bytes), tuple(response.warnings)
        )


def _in_order(found: Mapping[str, _V]) -> dict[str, _V]:
    """Layers and devices as people count them: the contract's maps have no order."""
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> list[tuple[bool, int, str]]:
    """Sorts "model.layers.9" before "model.layers.10", and numbers before words."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _unsigned(field: str, value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise invalid_field(field, f"must be 0 to {(1 << 32) - 1}; got {value}")
    return value


def _inspection_from_proto(response: inspection_pb2.InspectModelResponse) -> ModelInspection:
    facts = response.facts
    refusal: status_pb2.Status | None = response.refusal if response.HasField("refusal") else None
    return ModelInspection(
        model_type=facts.model_type,
        architecture=facts.architecture,
        parameters=facts.parameters,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        license=facts.license,
        has_chat_template=facts.has_chat_template,
        dtypes=dtypes_from_proto(facts),
        format=response.format,
        files={file.path: file.bytes for file in response.files},
        total_bytes=response.total_bytes,
        quantization=_quantization(response.quantization) if response.HasField("quantization") else None,
        refusal=None if refusal is None else from_status(refusal),
        task_facts=task_facts_from_proto(response.task_facts) if response.HasField("task_facts") else None,
    )


def _quantization(found: inspection_pb2.CheckpointQuantization) -> CheckpointQuantization:
    return CheckpointQuantization(
        method=found.method,
        format=found.format,
        bits=found.bits,
        group_size=found.group_size,
        strategy=found.strategy,
        symmetric=found.symmetric,
        activation_order=found.activation_order,
        activation_bits=found.activation_bits,
        ignored_modules=tuple(found.ignored_modules),
        quantized_parameters=found.quantized_parameters,
        unquantized_parameters=found.unquantized_parameters,
        summary=found.summary,
    )
