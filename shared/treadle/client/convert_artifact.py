"""The contract's artifacts as the client's."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

from treadle.api.registry.v1 import artifact_pb2, inspection_pb2, registry_pb2
from treadle.client.artifact import Artifact, ArtifactFile, DtypeShare, ModelSource, TaskFacts


def artifact_from_proto(artifact: artifact_pb2.Artifact) -> Artifact:
    """A model in the store."""
    facts = artifact.facts
    return Artifact(
        digest=artifact.digest,
        compute_digest=artifact.compute_digest,
        tokenizer_digest=artifact.tokenizer_digest,
        presentation_digest=artifact.presentation_digest,
        model_type=facts.model_type,
        architecture=facts.architecture,
        parameters=facts.parameters,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        license=facts.license,
        has_chat_template=facts.has_chat_template,
        files=tuple(ArtifactFile(file.path, file.digest, file.bytes) for file in artifact.files),
        source_files=tuple(
            ArtifactFile(file.path, file.digest, file.bytes) for file in artifact.source_files
        ),
        location=artifact.location,
        source=artifact.source,
        create_time=time_from_proto(artifact.create_time),
        converter=artifact.converter,
        total_bytes=artifact.total_bytes,
        quantization=facts.quantization,
        parent_digest=artifact.parent_digest,
        derivation=_derivation(artifact.derivation),
        dtypes=dtypes_from_proto(facts),
        task_facts=task_facts_from_proto(artifact.task_facts),
    )


def task_facts_from_proto(facts: artifact_pb2.TaskFacts) -> TaskFacts:
    """What can be asked of a model."""
    return TaskFacts(
        tasks=tuple(facts.tasks),
        pooling=facts.pooling,
        normalize=facts.normalize,
        embedding_dimensions=facts.embedding_dimensions,
        prompts=dict(facts.prompts),
        default_prompt_name=facts.default_prompt_name,
        skip_prompt=facts.skip_prompt,
        labels=tuple(facts.labels),
        multi_label=facts.multi_label,
        rank_activation=facts.rank_activation,
        similarity=facts.similarity,
        max_input_tokens=facts.max_input_tokens,
    )


def dtypes_from_proto(facts: artifact_pb2.ModelFacts) -> tuple[DtypeShare, ...]:
    """Types by their shares, the most parameters first."""
    return tuple(DtypeShare(share.dtype, share.parameters, share.bytes) for share in facts.dtypes)


def _derivation(derivation: artifact_pb2.Derivation) -> str:
    """In words; empty for one that was imported."""
    match derivation.WhichOneof("kind"):
        case "dtype":
            return f"dtype {derivation.dtype}"
        case "quantization":
            return f"quantization {derivation.quantization}"
        case "adapter_merge":
            return f"adapter {derivation.adapter_merge.digest} of {derivation.adapter_merge.folder}"
        case _:
            return ""


def time_from_proto(stamp: timestamp_pb2.Timestamp) -> datetime:
    """A moment, in UTC."""
    return stamp.ToDatetime(tzinfo=UTC)


def set_source(
    request: registry_pb2.ImportModelRequest | inspection_pb2.InspectModelRequest, source: ModelSource
) -> None:
    """Puts the source into the field of its kind."""
    if source.kind == "hub":
        request.hub.repository = source.value
        request.hub.revision = source.hub.revision
        request.hub.variant = source.hub.variant
        request.hub.gguf_file = source.hub.gguf_file
        request.hub.local_files_only = source.hub.local_files_only
    else:
        setattr(request, source.kind, source.value)
