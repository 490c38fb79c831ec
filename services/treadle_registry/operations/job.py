"""What a job's process is asked, and what it says: lines of JSON both ways.

Each kind of job is a frozen value that checks itself, with an outcome of its own; `job_process` does it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from treadle.errors import BY_CODE, FieldViolation, Internal, TreadleError
from treadle_registry.names import check_digest
from treadle_registry.operations.progress import Progress, Stage
from treadle_registry.sources.source import Source, source_from_json, source_to_json
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


Job = ImportJob | VerifyJob

_JOBS: dict[str, type[ImportJob] | type[VerifyJob]] = {job.kind: job for job in (ImportJob, VerifyJob)}


@dataclass(frozen=True, slots=True)
class Imported:
    """How an import ended well. For one that only checked, the manifest has no digest."""

    manifest: Manifest
    already_present: bool = False


@dataclass(frozen=True, slots=True)
class Verified:
    """How a verification ended; nothing damaged is a good end."""

    verified_bytes: int
    verified_artifacts: int
    damaged_files: tuple[DamagedFile, ...] = ()


Outcome = Imported | Verified
Event = Progress | Outcome | TreadleError

_MAX_MESSAGE = 2000
"""An error may quote what a stranger's file says, and goes into a line and a row."""


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
            "retry_after_s": event.retry_after_s,
        }
    }


def event_from_json(raw: dict[str, Any]) -> Event:
    """What `event_to_json` wrote."""
    if progress := raw.get("progress"):
        return Progress(**progress | {"stage": Stage(progress["stage"])})
    if manifest := raw.get("manifest"):
        return Imported(Manifest.from_json(manifest, "a job's answer"), raw["already_present"])
    if verified := raw.get("verified"):
        damaged = tuple(DamagedFile(**file) for file in verified["damaged_files"])
        return Verified(**verified | {"damaged_files": damaged})
    error = raw["error"]
    return BY_CODE.get(error["code"], Internal)(
        error["message"],
        reason=error["reason"],
        fields=[FieldViolation(**violation) for violation in error["fields"]],
        metadata=error["metadata"],
        retry_after_s=error.get("retry_after_s"),
    )
