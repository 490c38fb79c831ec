"""Leases: who uses an artifact, and what a worker does with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class Configuration:
    """How an artifact is computed. In a target an empty field is the worker's to choose.

    In a lease it is complete: an empty quantization is none, an empty cache_dtype is dtype.
    """

    dtype: str = ""
    quantization: str = ""
    cache_dtype: str = ""

    def admits(self, complete: Configuration) -> bool:
        """Whether a worker that computes so fits."""
        return (
            self.dtype in ("", complete.dtype)
            and self.quantization in ("", complete.quantization)
            and self.cache_dtype in ("", complete.cache_dtype or complete.dtype)
        )

    def overlaps(self, other: Configuration) -> bool:
        """Whether one worker could fit both."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        return all(not one or not another or one == another for one, another in pairs)

    def _fields(self) -> tuple[str, str, str]:
        return self.dtype, self.quantization, self.cache_dtype


class ServingState(StrEnum):
    """What a worker does with an artifact."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"

    @property
    def takes_a_place(self) -> bool:
        """Whether it counts among a target's replicas."""
        return self is not ServingState.DRAINING


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker failed: a status's name, a stable reason, a text."""

    code: str
    message: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    """A worker's part of a lease; an empty alias: of no deployment."""

    configuration: Configuration
    state: ServingState
    alias: str = ""
    failure: Failure | None = None

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Serving:
        """Reads what `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        failure = raw["failure"]
        return cls(
            Configuration(**raw["configuration"]),
            ServingState(raw["state"]),
            raw["alias"],
            Failure(**failure) if failure else None,
        )


@dataclass(frozen=True, slots=True)
class Lease:
    """A hold on an artifact until `deadline`, by the process's monotonic clock."""

    lease_id: str
    request_id: str
    digest: str
    compute_digest: str
    holder: str
    time_to_live_s: float
    serving: Serving | None
    deadline: float
    number: int = 0
    """Rises with every lease; 0 until it is stored."""

    @property
    def state(self) -> ServingState | None:
        """What its worker does; None for what is no worker's."""
        return self.serving.state if self.serving else None

    @property
    def alias(self) -> str:
        """The alias that its worker serves; empty: none."""
        return self.serving.alias if self.serving else ""


def serving_leases(leases: Iterable[Lease]) -> list[Lease]:
    """Those whose workers serve, or are about to."""
    return [lease for lease in leases if lease.state in (ServingState.LOADING, ServingState.READY)]
