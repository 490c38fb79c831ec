"""What an import is asked, and what its process says: lines of JSON both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from treadle.errors import BY_CODE, FieldViolation, Internal, TreadleError
from treadle_registry.operations.progress import ImportProgress, Stage
from treadle_registry.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Source:
    """What to import; `value` is an absolute path, a package's name or a repository."""

    kind: Literal["folder", "gguf_file", "package", "hub"]
    value: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}" if self.kind in ("package", "hub") else self.value


@dataclass(frozen=True, slots=True)
class Imported:
    """How an import ended well. For one that only checked, the manifest has no digest."""

    manifest: Manifest
    already_present: bool = False


_MAX_MESSAGE = 2000
"""An error may quote what a stranger's file says, and goes into a line and a row."""

Event = ImportProgress | Imported | TreadleError


def encode_job(store: Path, source: Source, *, validate_only: bool) -> bytes:
    """The line that starts an import."""
    job = {"store": str(store), "source": asdict(source), "validate_only": validate_only}
    return json.dumps(job).encode() + b"\n"


def decode_job(line: bytes) -> tuple[Path, Source, bool]:
    """The store, the source, and whether it is only to be checked."""
    job = json.loads(line)
    return Path(job["store"]), Source(**job["source"]), bool(job["validate_only"])


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as an object; `event_from_json` reads it."""
    if isinstance(event, ImportProgress):
        return {"progress": asdict(event) | {"stage": event.stage.value}}
    if isinstance(event, Imported):
        return {"manifest": event.manifest.to_json(), "already_present": event.already_present}
    return {
        "error": {
            "code": event.code,
            "message": event.message[:_MAX_MESSAGE],
            "reason": event.reason,
            "fields": [
                {"field": violation.field, "description": violation.description[:_MAX_MESSAGE]}
                for violation in event.fields
            ],
            "metadata": event.metadata,
        }
    }


def event_from_json(raw: dict[str, Any]) -> Event:
    """What `event_to_json` wrote."""
    if progress := raw.get("progress"):
        return ImportProgress(Stage(progress["stage"]), progress["done_bytes"], progress["total_bytes"])
    if manifest := raw.get("manifest"):
        return Imported(Manifest.from_json(manifest, "an import's answer"), raw["already_present"])
    error = raw["error"]
    return BY_CODE.get(error["code"], Internal)(
        error["message"],
        reason=error["reason"],
        fields=[FieldViolation(**violation) for violation in error["fields"]],
        metadata=error["metadata"],
    )
