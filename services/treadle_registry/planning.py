"""Plans over artifacts: what a model takes and where its parts go, by its configuration alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from treadle.errors import FailedPrecondition, FieldViolation, invalid_field
from treadle.models.device_budget import Budget, balanced, ordered, read_size
from treadle.models.device_map import infer_device_map
from treadle.models.device_map_check import PlacedModel, check_device_map, place
from treadle.models.families import AnyConfig, module_tree, read_any_config
from treadle.models.memory_estimate import (
    MemoryEstimate,
    check_precision,
    estimate_serving,
    estimate_training,
)
from treadle.models.module_tree import module_bytes, tensor_bytes
from treadle.models.quantized_weights import QUANTIZATIONS
from treadle_registry.registry import Registry
from treadle_registry.rollout.lease import Configuration

Strategy = Literal["auto", "balanced", "balanced_low_0", "sequential"]
_MOST_ENTRIES = 20_000
_LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a model is trained, as far as memory depends on it; `lora_rank` 0 trains every parameter."""

    gradient_checkpointing: bool = False
    lora_rank: int = 0


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """Devices and what they have; or a map by hand, to be checked."""

    strategy: Strategy = "auto"
    free_memory: Mapping[str, int] | None = None
    max_memory: Mapping[str, str] | None = None
    device_map: Mapping[str, str] | None = None


class Planner:
    """Answers from config.json of an artifact."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def estimate(
        self,
        model: str,
        configuration: Configuration,
        context: int,
        batch: int,
        training: TrainingPlan | None,
    ) -> MemoryEstimate:
        """Of an alias or digest; 0 for `context` is the model's, for `batch` one.

        Raises NotFound, and InvalidArgument that names the field.
        """
        config, quantization = await self._model(model, configuration)
        if training is None:
            return estimate_serving(
                config,
                dtype=configuration.dtype,
                quantization=quantization,
                cache_dtype=configuration.cache_dtype,
                context=context,
                batch=batch,
            )
        return estimate_training(
            config,
            dtype=configuration.dtype,
            quantization=quantization,
            context=context,
            batch=batch,
            gradient_checkpointing=training.gradient_checkpointing,
            lora_rank=training.lora_rank,
        )

    async def place(self, model: str, configuration: Configuration, request: PlacementRequest) -> PlacedModel:
        """A device map of an alias or digest; raises NotFound, and InvalidArgument that names the field."""
        budget, is_users = _budget(request)
        config, quantization = await self._model(model, configuration)
        dtype = check_precision(configuration.dtype, quantization, config)
        # Some ten milliseconds for the largest models.
        return await asyncio.to_thread(_place, config, dtype, quantization, request, budget, is_users)

    async def _model(self, model: str, configuration: Configuration) -> tuple[AnyConfig, str]:
        """The configuration, and how the weights are quantised once they are loaded.

        Raises FailedPrecondition (QUANTIZED_OTHERWISE) as a worker would.
        """
        published, _ = await self._registry.resolve(model)
        config = await self._registry.in_thread(read_any_config, published.canonical_folder)
        stored = published.manifest.facts.quantization
        asked = configuration.quantization
        if stored and asked != stored and asked in QUANTIZATIONS[1:]:
            raise FailedPrecondition(
                f"configuration.quantization: the model is stored as {stored}, which no worker serves as "
                f"{asked}; ask for the model that it was made of, or leave it empty",
                reason="QUANTIZED_OTHERWISE",
                fields=(FieldViolation("configuration.quantization", f"the model is stored as {stored}"),),
            )
        # What else is stored becomes floats again as it is loaded.
        return config, asked or (stored if stored in QUANTIZATIONS else "")


def _budget(request: PlacementRequest) -> tuple[Budget, bool]:
    """What each device may hold, and whether the user said so; raises InvalidArgument."""
    if request.max_memory:
        sizes = {device: read_size(text, "max_memory") for device, text in request.max_memory.items()}
        return ordered(sizes, "max_memory"), True
    if request.free_memory:
        return ordered(dict(request.free_memory), "free_memory"), False
    if request.device_map:
        return {}, False
    raise invalid_field(
        "free_memory",
        "say what the devices have free, as in {'0': 25769803776, 'cpu': 68719476736}, or in max_memory what "
        "may be used of them; what is not named is not used, but for the disk",
    )


def _place(
    config: AnyConfig,
    dtype: str,
    quantization: str,
    request: PlacementRequest,
    budget: Budget,
    is_users: bool,
) -> PlacedModel:
    tree = module_tree(config)
    tensors = tensor_bytes(tree, dtype, quantization)
    if request.device_map:
        device_map = dict(request.device_map)
        if len(device_map) > _MOST_ENTRIES or max(map(len, device_map)) > _LONGEST_NAME:
            raise invalid_field(
                "device_map",
                f"must have at most {_MOST_ENTRIES} modules with names of at most {_LONGEST_NAME} characters",
            )
        check_device_map(tree, device_map)
        return place(tree, tensors, device_map, budget)
    sizes = module_bytes(tensors)
    shares = budget
    if request.strategy != "sequential":
        low_zero = request.strategy == "balanced_low_0"
        shares = balanced(budget, tree, sizes, low_zero=low_zero, is_users=is_users)
    return place(tree, tensors, infer_device_map(tree, sizes, shares), budget)
