"""A deployment as whoever serves it, or sends requests to it, needs to know it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServingConfiguration:
    """How an artifact is computed. As somebody wants it, an empty field is the worker's settings' to fill."""

    dtype: str = ""
    """ "bfloat16", "float32" or "float16"."""
    quantization: str = ""
    """ "int8" or "int4"; in a complete configuration empty is none."""
    cache_dtype: str = ""
    """ "bfloat16", "float32", "float16" or "int8"; of keys and values."""

    def met_by(self, complete: ServingConfiguration) -> bool:
        """Whether what is asked for here is what `complete` says."""
        return (
            self.dtype in ("", complete.dtype)
            and self.quantization in ("", complete.quantization)
            and self.cache_dtype in ("", complete.cache_dtype)
        )


@dataclass(frozen=True, slots=True)
class Target:
    """An artifact, how it is computed, and its share of the requests relative to the other target."""

    artifact_digest: str
    configuration: ServingConfiguration = field(default_factory=ServingConfiguration)
    weight: int = 0

    @property
    def what(self) -> tuple[str, ServingConfiguration]:
        """The target without its weight."""
        return self.artifact_digest, self.configuration


@dataclass(frozen=True, slots=True)
class Deployment:
    """What an alias should be served as (`targets`), and what requests are sent to now (`serving`)."""

    alias: str
    targets: tuple[Target, ...]
    serving: tuple[Target, ...] = ()
    replicas: int = 1
    """Workers wanted a target."""
    warm_up_prompts: tuple[str, ...] = ()

    @property
    def concerned(self) -> tuple[Target, ...]:
        """What is served and what is wanted, each once, what is served first."""
        return tuple(_once([*self.serving, *self.targets]))


def _once(targets: Iterable[Target]) -> list[Target]:
    found: dict[tuple[str, ServingConfiguration], Target] = {}
    for target in targets:
        found.setdefault(target.what, target)
    return list(found.values())
