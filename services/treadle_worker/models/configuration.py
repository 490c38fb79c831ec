"""How a model is computed: the worker's settings, and what a deployment wants instead."""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError

from treadle.deployments import ServingConfiguration
from treadle.errors import FailedPrecondition
from treadle_worker.config import EngineConfig
from treadle_worker.models.wanted import Claim


def configured(config: EngineConfig, wanted: ServingConfiguration) -> EngineConfig:
    """The settings with what is wanted in their place; raises FailedPrecondition (NOT_SERVABLE_HERE)."""
    asked = {
        "dtype": wanted.dtype,
        "quantization": wanted.quantization,
        "cache_dtype": wanted.cache_dtype,
    }
    given = {name: value for name, value in asked.items() if value}
    try:
        # Everything is given, so that nothing is read from the environment a second time.
        return EngineConfig.model_validate(config.model_dump() | given)
    except ValidationError as error:
        wrong = ", ".join(f"{name} {asked.get(str(name))!r}" for name in _fields(error))
        raise FailedPrecondition(
            f"this worker cannot compute a model with {wrong}; change the deployment's configuration",
            reason="NOT_SERVABLE_HERE",
        ) from error


def _fields(error: ValidationError) -> list[str | int]:
    return [one["loc"][0] for one in error.errors() if one["loc"]]


def filled(claim: Claim, config: EngineConfig, *, is_encoder: bool = False) -> Claim:
    """The claim with its configuration complete; as it was where this worker cannot compute it."""
    try:
        asked = configured(config, claim.configuration).resolved(is_encoder=is_encoder)
        return replace(claim, configuration=complete(asked))
    except FailedPrecondition:
        return claim


def complete(config: EngineConfig) -> ServingConfiguration:
    """What the settings say, nothing left open; for a decoder, where the dtype is."""
    if config.dtype == "auto":
        return complete(config.resolved(is_encoder=False))
    cache_dtype = config.dtype if config.cache_dtype == "auto" else config.cache_dtype
    return ServingConfiguration(config.dtype, config.quantization, cache_dtype)
