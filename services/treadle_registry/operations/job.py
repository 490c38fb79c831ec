"""What a job's process is asked, and what it says: lines of JSON both ways.

Each kind of job is a frozen value that checks itself, with an outcome of its own; `job_process` does it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from treadle.errors import TreadleError
from treadle_registry.formats.inspection import Inspection
from treadle_registry.names import check_digest
from treadle_registry.operations.error_json import error_from_json, error_to_json
from treadle_registry.operations.inspection_json import inspection_from_json, inspection_to_json
from treadle_registry.operations.progress import Progress, Stage
from treadle_registry.sources.source import (
    LookedAt,
    Source,
    looked_at_from_json,
    source_from_json,
    source_to_json,
)
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.manifest import Manifest
from treadle_registry.store.verification import DamagedFile


@dataclass(frozen=True, slots=True)
class ImportJob:
    """Bring a model into the store; or only say what that would give."""

    source: Source
    validate_only: bool = False

    kind: ClassVar = "import"

    @property
    def field(self) -> str:
        """The request's field that is at fault when the job says that its request is."""
        return self.source.field

    def check(self) -> None:
        """Raises InvalidArgument that names the field."""
        self.source.check()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"source": source_to_json(self.source), "validate_only": self.validate_only}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ImportJob:
        """What `to_json` wrote."""
        return cls(source_from_json(raw["source"]), bool(raw["validate_only"]))


@dataclass(frozen=True, slots=True)
class VerifyJob:
    """Hash an artifact's files again, or every artifact's where `digest` is empty."""

    digest: str = ""

    kind: ClassVar = "verify"
    field: ClassVar = "digest"

    def check(self) -> None:
        """Raises InvalidArgument that names the field."""
        if self.digest:
            check_digest(self.digest, "digest")

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> VerifyJob:
        """What `to_json` wrote."""
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class InspectJob:
    """Say what a source's model is; no operation, and nothing is kept."""

    source: LookedAt

    kind: ClassVar = "inspect"

    @property
    def field(self) -> str:
        """The request's field that is at fault when the job says that its request is."""
        return self.source.field

    def check(self) -> None:
        """Raises InvalidArgument that names the field."""
        self.source.check()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"source": source_to_json(self.source)}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> InspectJob:
        """What `to_json` wrote."""
        return cls(looked_at_from_json(raw["source"]))


@dataclass(frozen=True, slots=True)
class DeriveJob:
    """Make another form of an artifact. Two that ask for the same by the same name are equal."""

    model: str
    """An alias or digest, as the client wrote it."""
    derivation: Derivation
    parent_digest: str = dataclasses.field(default="", compare=False)
    """What that meant when it was asked for."""

    kind: ClassVar = "derive"

    @property
    def field(self) -> str:
        """The request's field that is at fault when the job says that its request is."""
        return self.derivation.field

    def check(self) -> None:
        """Raises InvalidArgument that names the field."""
        self.derivation.check()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> DeriveJob:
        """What `to_json` wrote."""
        return cls(**raw | {"derivation": Derivation(**raw["derivation"])})


Job = ImportJob | VerifyJob | InspectJob | DeriveJob

_JOBS: dict[str, type[ImportJob] | type[VerifyJob] | type[InspectJob] | type[DeriveJob]] = {
    job.kind: job for job in (ImportJob, VerifyJob, InspectJob, DeriveJob)
}


@dataclass(frozen=True, slots=True)
class Imported:
    """How an import or a derivation ended well. For one that only checked, the manifest has no digest."""

    manifest: Manifest
    already_present: bool = False


@dataclass(frozen=True, slots=True)
class Verified:
    """How a verification ended; nothing damaged is a good end."""

    verified_bytes: int
    verified_artifacts: int
    damaged_files: tuple[DamagedFile, ...] = ()


Outcome = Imported | Verified | Inspection
Event = Progress | Outcome | TreadleError


def job_to_json(job: Job) -> dict[str, Any]:
    """A job as an object; `job_from_json` reads it."""
    return {"kind": job.kind} | job.to_json()


def job_from_json(raw: dict[str, Any]) -> Job:
    """What `job_to_json` wrote."""
    fields = dict(raw)
    return _JOBS[fields.pop("kind")].from_json(fields)


def encode_job(store: Path, job: Job) -> bytes:
    """The line that starts a job."""
    return json.dumps({"store": str(store), "job": job_to_json(job)}).encode() + b"\n"


def decode_job(line: bytes) -> tuple[Path, Job]:
    """The store and the job."""
    raw = json.loads(line)
    return Path(raw["store"]), job_from_json(raw["job"])


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as an object; `event_from_json` reads it."""
    if isinstance(event, Progress):
        return {"progress": asdict(event) | {"stage": event.stage.value}}
    if isinstance(event, Imported):
        return {"manifest": event.manifest.to_json(), "already_present": event.already_present}
    if isinstance(event, Verified):
        return {"verified": asdict(event)}
    if isinstance(event, Inspection):
        return {"inspection": inspection_to_json(event)}
    return {"error": error_to_json(event)}


def event_from_json(raw: dict[str, Any]) -> Event:
    """What `event_to_json` wrote."""
    if progress := raw.get("progress"):
        return Progress(**progress | {"stage": Stage(progress["stage"])})
    if manifest := raw.get("manifest"):
        return Imported(Manifest.from_json(manifest, "a job's answer"), raw["already_present"])
    if verified := raw.get("verified"):
        damaged = tuple(DamagedFile(**file) for file in verified["damaged_files"])
        return Verified(**verified | {"damaged_files": damaged})
    if inspection := raw.get("inspection"):
        return inspection_from_json(inspection)
    return error_from_json(raw["error"])
