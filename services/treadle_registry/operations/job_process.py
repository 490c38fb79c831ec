"""One job as a process of its own: `python -m treadle_registry.operations.job_process`.

Converting and hashing are all computation, so they have no place on the registry's event loop, and a process
can be killed at any moment. The job is one line on standard input, which stays open as long as the parent
lives; what happens is told in lines on standard output, last the result or the error. See `job` for both.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from dataclasses import replace

from treadle.errors import FieldViolation, ResourceExhausted, TreadleError
from treadle.telemetry import configure_logging
from treadle_registry.config import HubConfig, RemotesConfig
from treadle_registry.formats.inspection import Inspection
from treadle_registry.operations.deriving import derive
from treadle_registry.operations.importing import check_source, import_source
from treadle_registry.operations.job import (
    DeriveJob,
    Event,
    Imported,
    ImportJob,
    InspectJob,
    Job,
    Outcome,
    Verified,
    VerifyJob,
    decode_job,
    event_to_json,
)
from treadle_registry.operations.progress import Progress, Report, Stage
from treadle_registry.operations.uploaded_import import check_uploaded, import_uploaded
from treadle_registry.sources.inspecting import inspect_source
from treadle_registry.sources.remote_source import RemoteSource
from treadle_registry.sources.source import Source
from treadle_registry.sources.uploaded_source import UploadedSource
from treadle_registry.store.manifest import Manifest
from treadle_registry.store.staging import NOT_WRITABLE_STORE, READ_ONLY_STORE
from treadle_registry.store.store import Published, Store
from treadle_registry.store.verification import verify_artifacts

_EVERY_S = 0.05

_OF_THE_SOURCE = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "PERMISSION_DENIED")
"""Errors that say what is wrong with what is to be imported."""

_OF_THE_STORE = (READ_ONLY_STORE, NOT_WRITABLE_STORE, "NEWER_MANIFEST")
"""Reasons that have nothing to do with it."""

MAX_MEMORY_BYTES = 3 << 30
"""Weights go through piece by piece, never all at once; the largest tokenizers take half a gigabyte."""


class _Speaker:
    """Writes events; of progress within a stage no more than twenty a second."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._last = 0.0

    def say(self, event: Event) -> None:
        sys.stdout.write(json.dumps(event_to_json(event)) + "\n")
        sys.stdout.flush()

    def report(self, progress: Progress) -> None:
        now, whole = time.monotonic(), progress.done_bytes == progress.total_bytes
        if progress.stage != self._stage or now >= self._last + _EVERY_S or whole:
            self._stage, self._last = progress.stage, now
            self.say(progress)


def _check(store: Store, source: Source) -> Manifest:
    if isinstance(source, UploadedSource):
        return check_uploaded(store, source)
    if isinstance(source, RemoteSource):
        # A quarter of a second, which the others need not spend.
        from treadle_registry.operations.remote_import import check_remote

        return check_remote(source, RemotesConfig())
    return check_source(source, HubConfig())


def _published(store: Store, source: Source, report: Report) -> Published:
    if isinstance(source, UploadedSource):
        return import_uploaded(store, source, report)
    if isinstance(source, RemoteSource):
        from treadle_registry.operations.remote_import import import_remote

        return import_remote(store, source, RemotesConfig(), report)
    return import_source(store, source, report, HubConfig())


def _import(store: Store, job: ImportJob, report: Report) -> Imported:
    if job.validate_only:
        report(Progress(Stage.CHECKING))
        return Imported(_check(store, job.source))
    published = _published(store, job.source, report)
    return Imported(published.manifest, published.already_present)


def _verify(store: Store, job: VerifyJob, report: Report) -> Verified:
    digests = [store.get(job.digest).manifest.digest] if job.digest else store.digests()
    size, damaged = verify_artifacts(store, digests, report)
    return Verified(size, len(digests), tuple(damaged))


def _inspect(job: InspectJob) -> Inspection:
    found = inspect_source(job.source, HubConfig())
    return replace(found, refusal=_naming_field(found.refusal, job) if found.refusal else None)


def _derive(store: Store, job: DeriveJob, report: Report) -> Imported:
    published = derive(store, job.parent_digest, job.derivation, report)
    return Imported(published.manifest, published.already_present)


def run_job(store: Store, job: Job, report: Report) -> Outcome:
    """Does the job in this process; raises TreadleError."""
    match job:
        case ImportJob():
            return _import(store, job, report)
        case DeriveJob():
            return _derive(store, job, report)
        case VerifyJob():
            return _verify(store, job, report)
        case InspectJob():
            return _inspect(job)


def _naming_field(error: TreadleError, job: Job) -> TreadleError:
    """The error, with the request's field that named the source where the source is at fault."""
    if error.fields or error.code not in _OF_THE_SOURCE or error.reason in _OF_THE_STORE:
        return error
    return type(error)(
        f"{job.field}: {error.message}",
        reason=error.reason,
        fields=(FieldViolation(job.field, error.message),),
        metadata=error.metadata,
    )


def _end_with_parent() -> None:
    """Ends this process when standard input ends: where the kernel does not do it, this does."""
    sys.stdin.buffer.read()
    os._exit(1)


def _bound_memory() -> None:
    """Memory maps of files do not count, so that a file may be larger."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def main() -> None:
    """Runs the job on standard input; exits 0 also after an error that it told of."""
    configure_logging("registry-job")
    speaker = _Speaker()
    store, job = decode_job(sys.stdin.buffer.readline())
    _bound_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        speaker.say(run_job(Store(store), job, speaker.report))
    except TreadleError as error:
        speaker.say(_naming_field(error, job))
    except MemoryError:
        speaker.say(
            ResourceExhausted(
                f"reading the model takes more than {MAX_MEMORY_BYTES} bytes of memory; its tokenizer or its "
                "header is larger than any known one",
                reason="IMPORT_TOO_LARGE",
            )
        )


if __name__ == "__main__":
    main()
