"""What a deployment may want: every bound of it."""

from __future__ import annotations

from treadle.errors import invalid_field
from treadle_registry.names import check_alias, check_digest
from treadle_registry.rollout.deployment import Deployment, Target
from treadle_registry.rollout.lease import Configuration

MAX_REPLICAS = 1000
MAX_WEIGHT = 1_000_000
MAX_PROMPTS = 16
MAX_PROMPT = 8192
"""Characters."""
_TYPES = ("", "bfloat16", "float16", "float32")
_QUANTIZATIONS = ("", "int8", "int4")
_CACHE_TYPES = (*_TYPES, "int8")


def check_wanted(wanted: Deployment) -> None:
    """Raises InvalidArgument that names the field."""
    check_alias(wanted.alias, "deployment.alias")
    if len(wanted.targets) not in (1, 2):
        raise invalid_field(
            "deployment.targets", f"must be one, or two for a canary; got {len(wanted.targets)}"
        )
    for number, target in enumerate(wanted.targets):
        _check_target(target, f"deployment.targets[{number}]")
    if not any(target.weight for target in wanted.targets):
        raise invalid_field("deployment.targets", "must have a weight above 0 in one of the two")
    if len(wanted.targets) == 2 and wanted.targets[0].overlaps(wanted.targets[1]):
        raise invalid_field(
            "deployment.targets",
            "must not be met by one worker both: name two artifacts, or two configurations that differ",
        )
    if not 1 <= wanted.replicas <= MAX_REPLICAS:
        raise invalid_field(
            "deployment.replicas", f"must be 1 to {MAX_REPLICAS}, or 0 for 1; got {wanted.replicas}"
        )
    _check_prompts(wanted.warm_up_prompts)


def check_configuration(configuration: Configuration, field: str) -> None:
    """Raises InvalidArgument for a type that no worker computes in."""
    for name, known in (
        ("dtype", _TYPES),
        ("quantization", _QUANTIZATIONS),
        ("cache_dtype", _CACHE_TYPES),
    ):
        value = getattr(configuration, name)
        if value not in known:
            choice = ", ".join(known[1:])
            raise invalid_field(f"{field}.{name}", f"must be empty or one of {choice}; got {value[:64]!r}")


def _check_target(target: Target, field: str) -> None:
    check_digest(target.digest, f"{field}.artifact_digest")
    check_configuration(target.configuration, f"{field}.configuration")
    if target.weight > MAX_WEIGHT:
        raise invalid_field(f"{field}.weight", f"must be at most {MAX_WEIGHT}; got {target.weight}")


def _check_prompts(prompts: tuple[str, ...]) -> None:
    if len(prompts) > MAX_PROMPTS:
        raise invalid_field(
            "deployment.warm_up_prompts", f"must be at most {MAX_PROMPTS}; got {len(prompts)}"
        )
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= MAX_PROMPT:
            raise invalid_field(
                f"deployment.warm_up_prompts[{number}]",
                f"must have 1 to {MAX_PROMPT} characters; got {len(prompt)}",
            )
