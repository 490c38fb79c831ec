"""What an import may name as a source. Each kind checks what a client wrote before anything is looked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from treadle.errors import invalid_field
from treadle_registry.names import check_source_path
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.remote_source import RemoteSource
from treadle_registry.sources.uploaded_source import UploadedSource


@dataclass(frozen=True, slots=True)
class LocalSource:
    """Something on this machine; `value` is an absolute path or a package's name."""

    kind: Literal["folder", "gguf_file", "package"]
    value: str

    @property
    def field(self) -> str:
        """The request's field that names it."""
        return self.kind

    def check(self) -> None:
        """Raises InvalidArgument that names the field."""
        if self.kind != "package":
            check_source_path(self.value, self.kind)
        elif not self.value:
            raise invalid_field("package", "must be a package's name, as pip has it")

    def __str__(self) -> str:
        return f"package:{self.value}" if self.kind == "package" else self.value


LookedAt = LocalSource | HubSource
"""What can be looked at without bringing it here."""
Source = LookedAt | RemoteSource | UploadedSource

_OTHERS: dict[str, type[HubSource] | type[RemoteSource] | type[UploadedSource]] = {
    other.kind: other for other in (HubSource, RemoteSource, UploadedSource)
}


def source_to_json(source: Source) -> dict[str, Any]:
    """A source as an object; `source_from_json` reads it."""
    return {"kind": source.kind} | asdict(source)


def looked_at_from_json(raw: dict[str, Any]) -> LookedAt:
    """What `source_to_json` wrote of one that can be looked at."""
    source = source_from_json(raw)
    assert isinstance(source, LocalSource | HubSource)
    return source


def source_from_json(raw: dict[str, Any]) -> Source:
    """What `source_to_json` wrote."""
    fields = dict(raw)
    other = _OTHERS.get(fields["kind"])
    if other is None:
        return LocalSource(**fields)
    del fields["kind"]
    return other(**fields)
