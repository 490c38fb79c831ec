"""What the worker needs of the registry, in plain Python."""

from __future__ import annotations

from typing import Protocol

from treadle_worker.jobs import Artifact
from treadle_worker.models.leases import Leases


class Registry(Leases, Protocol):
    """The registry. Every call raises TreadleError."""

    async def resolve(self, model: str) -> Artifact:
        """The artifact that an alias or digest means now; raises NotFound."""
