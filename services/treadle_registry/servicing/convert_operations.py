"""Between jobs, as operations, and the contract's messages."""

from __future__ import annotations

from google.longrunning import operations_proto_pb2
from google.protobuf.message import Message

from treadle.api.registry.v1 import derivation_pb2, inspection_pb2, registry_pb2, source_pb2
from treadle.errors import TreadleError, invalid_field
from treadle.rpc import to_status
from treadle_registry.operations.job import DeriveJob, Imported, ImportJob, Outcome, Verified, VerifyJob
from treadle_registry.operations.operations import Operation, OperationRequest
from treadle_registry.operations.progress import Stage
from treadle_registry.servicing.convert import artifact_to_proto, timestamp_to_proto
from treadle_registry.servicing.convert_derivation import derivation_to_proto
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.remote_source import RemoteSource
from treadle_registry.sources.source import LocalSource, LookedAt, Source
from treadle_registry.sources.uploaded_source import UploadedSource
from treadle_registry.store.store import Store

_IMPORT_STAGES = {
    Stage.CHECKING: registry_pb2.IMPORT_STAGE_CHECKING,
    Stage.DOWNLOADING: registry_pb2.IMPORT_STAGE_DOWNLOADING,
    Stage.COPYING: registry_pb2.IMPORT_STAGE_COPYING,
    Stage.CONVERTING: registry_pb2.IMPORT_STAGE_CONVERTING,
    Stage.PUBLISHING: registry_pb2.IMPORT_STAGE_PUBLISHING,
}


def import_from_proto(request: registry_pb2.ImportModelRequest) -> OperationRequest:
    """What is to be imported; raises InvalidArgument where no source is given."""
    return OperationRequest(ImportJob(_source(request), request.validate_only), request.alias)


def _source(request: registry_pb2.ImportModelRequest) -> Source:
    match request.WhichOneof("source"):
        case "registry":
            return RemoteSource(request.registry.remote, request.registry.model)
        case "uploaded":
            files = tuple((file.name, file.digest) for file in request.uploaded.files)
            return UploadedSource(files, request.uploaded.source)
        case None:
            raise invalid_field(
                "source", "give one of folder, gguf_file, package, hub, registry and uploaded"
            )
        case _:
            return looked_at_from_proto(request)


def looked_at_from_proto(
    request: registry_pb2.ImportModelRequest | inspection_pb2.InspectModelRequest,
) -> LookedAt:
    """A source that can be looked at without bringing it here; raises InvalidArgument where none is given."""
    match request.WhichOneof("source"):
        case "folder":
            return LocalSource("folder", request.folder)
        case "gguf_file":
            return LocalSource("gguf_file", request.gguf_file)
        case "package":
            return LocalSource("package", request.package)
        case "hub":
            return _hub_source(request.hub)
        case _:
            raise invalid_field("source", "give one of folder, gguf_file, package and hub")


def _hub_source(hub: source_pb2.HubSource) -> HubSource:
    return HubSource(hub.repository, hub.revision, hub.variant, hub.gguf_file, hub.local_files_only)


def verification_from_proto(request: registry_pb2.VerifyArtifactRequest) -> OperationRequest:
    """What is to be hashed again."""
    return OperationRequest(VerifyJob(request.digest))


def operation_to_proto(operation: Operation, store: Store) -> operations_proto_pb2.Operation:
    """A job's operation, with its progress and, once it has ended, its response or error."""
    message = operations_proto_pb2.Operation(name=operation.name, done=operation.outcome is not None)
    message.metadata.Pack(_metadata(operation))
    outcome = operation.outcome
    if isinstance(outcome, TreadleError):
        message.error.CopyFrom(to_status(outcome))
    elif outcome is not None:
        message.response.Pack(_response(operation, outcome, store))
    return message


def _metadata(operation: Operation) -> Message:
    job, progress = operation.request.job, operation.progress
    create_time = timestamp_to_proto(operation.create_time)
    if isinstance(job, VerifyJob):
        return registry_pb2.VerifyArtifactMetadata(
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            done_artifacts=progress.done_items,
            total_artifacts=progress.total_items,
            create_time=create_time,
        )
    if isinstance(job, DeriveJob):
        return derivation_pb2.DeriveArtifactMetadata(
            parent_digest=job.parent_digest,
            derivation=derivation_to_proto(job.derivation),
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            create_time=create_time,
        )
    return registry_pb2.ImportModelMetadata(
        stage=_IMPORT_STAGES[progress.stage],
        source=str(job.source),
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        done_files=progress.done_items,
        total_files=progress.total_items,
        create_time=create_time,
    )


def _response(operation: Operation, outcome: Outcome, store: Store) -> Message:
    if isinstance(outcome, Imported):
        manifest = outcome.manifest
        location = str(store.folder(manifest.digest) / "canonical") if manifest.digest else ""
        response = (
            derivation_pb2.DeriveArtifactResponse
            if isinstance(operation.request.job, DeriveJob)
            else registry_pb2.ImportModelResponse
        )
        return response(
            artifact=artifact_to_proto(manifest, location),
            alias=operation.request.alias,
            already_present=outcome.already_present,
        )
    assert isinstance(outcome, Verified)
    return registry_pb2.VerifyArtifactResponse(
        verified_bytes=outcome.verified_bytes,
        verified_artifacts=outcome.verified_artifacts,
        damaged_files=[
            registry_pb2.DamagedFile(
                artifact_digest=file.artifact_digest,
                path=file.path,
                expected_digest=file.expected_digest,
                found_digest=file.found_digest,
            )
            for file in outcome.damaged_files
        ],
    )
