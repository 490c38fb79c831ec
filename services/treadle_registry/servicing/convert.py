"""Between the registry's own types and the contract's messages."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import timestamp_pb2

from treadle.api.registry.v1 import artifact_pb2, registry_pb2
from treadle.models.stored_folder import StoredFile
from treadle_registry.catalog.aliases import Alias
from treadle_registry.servicing.convert_derivation import derivation_to_proto
from treadle_registry.store.manifest import GenerationDefaults, Manifest, ModelFacts
from treadle_registry.store.store import Published
from treadle_registry.store.task_facts import TaskFacts


def timestamp_to_proto(seconds: float) -> timestamp_pb2.Timestamp:
    """Seconds since 1970."""
    stamp = timestamp_pb2.Timestamp()
    # Rounded, so that a moment that was read here becomes the same one again.
    stamp.FromNanoseconds(round(seconds * 1e6) * 1000)
    return stamp


def artifact_to_proto(manifest: Manifest, location: str) -> artifact_pb2.Artifact:
    """An artifact; one that was only looked at has no digests and no location."""
    digests = manifest.digests
    return artifact_pb2.Artifact(
        digest=manifest.digest,
        compute_digest=digests.compute if digests else "",
        tokenizer_digest=digests.tokenizer if digests else "",
        presentation_digest=digests.presentation if digests else "",
        facts=facts_to_proto(manifest.facts),
        generation_defaults=_defaults(manifest.defaults),
        files=_files(manifest.files),
        source_files=_files(manifest.source_files),
        location=location,
        source=manifest.source,
        create_time=timestamp_to_proto(manifest.create_time) if manifest.create_time else None,
        converter=manifest.converter,
        parent_digest=manifest.parent_digest,
        derivation=derivation_to_proto(manifest.derivation) if manifest.derivation else None,
        total_bytes=manifest.total_bytes,
        task_facts=task_facts_to_proto(manifest.task_facts),
    )


def published_to_proto(published: Published) -> artifact_pb2.Artifact:
    """An artifact in the store."""
    return artifact_to_proto(published.manifest, str(published.canonical_folder))


def facts_to_proto(facts: ModelFacts) -> artifact_pb2.ModelFacts:
    """What people ask of a model first."""
    return artifact_pb2.ModelFacts(
        model_type=facts.model_type,
        architecture=facts.architecture,
        parameters=facts.parameters,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        license=facts.license,
        has_chat_template=facts.has_chat_template,
        dtypes=[
            artifact_pb2.DtypeShare(dtype=share.dtype, parameters=share.parameters, bytes=share.bytes)
            for share in facts.dtypes
        ],
        quantization=facts.quantization,
    )


def task_facts_to_proto(facts: TaskFacts) -> artifact_pb2.TaskFacts:
    """What can be asked of a model."""
    return artifact_pb2.TaskFacts(
        tasks=facts.tasks,
        pooling=facts.pooling,
        normalize=facts.normalize,
        embedding_dimensions=facts.embedding_dimensions,
        prompts=facts.prompts,
        default_prompt_name=facts.default_prompt_name,
        skip_prompt=facts.skip_prompt,
        labels=facts.labels,
        multi_label=facts.multi_label,
        rank_activation=facts.rank_activation,
        similarity=facts.similarity,
        max_input_tokens=facts.max_input_tokens,
    )


def _defaults(defaults: GenerationDefaults) -> artifact_pb2.GenerationDefaults:
    return artifact_pb2.GenerationDefaults(
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
        eos_token_ids=defaults.eos_token_ids,
        bos_token_id=defaults.bos_token_id,
        pad_token_id=defaults.pad_token_id,
    )


def _files(files: Sequence[StoredFile]) -> list[artifact_pb2.ArtifactFile]:
    return [artifact_pb2.ArtifactFile(path=file.path, digest=file.digest, bytes=file.size) for file in files]


def alias_to_proto(alias: Alias) -> registry_pb2.Alias:
    """An alias, or an entry of its history."""
    return registry_pb2.Alias(
        name=alias.name,
        artifact_digest=alias.digest,
        etag=alias.etag,
        update_time=timestamp_to_proto(alias.update_time),
    )
