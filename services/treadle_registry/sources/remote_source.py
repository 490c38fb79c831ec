"""What of another registry a client asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from treadle.errors import invalid_field
from treadle_registry.names import check_alias, is_digest


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """An artifact of a registry that the settings know by a name; never an address."""

    remote: str
    model: str
    """An alias or digest there."""

    kind: ClassVar = "registry"
    field: ClassVar = "registry"

    def check(self) -> None:
        """Raises InvalidArgument that names the field of the request."""
        check_alias(self.remote, "registry.remote")
        if not self.model:
            raise invalid_field("registry.model", "must be an alias or digest of the other registry")
        if not is_digest(self.model):
            check_alias(self.model, "registry.model")

    def __str__(self) -> str:
        return f"registry:{self.remote}/{self.model}"
