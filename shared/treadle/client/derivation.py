"""Making other forms of a model in the store."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from treadle.api.registry.v1 import artifact_pb2, derivation_pb2
from treadle.client.artifact import Artifact
from treadle.client.convert_artifact import artifact_from_proto
from treadle.client.registry_connection import LONG_S, RegistryConnection


@dataclass(frozen=True, slots=True)
class DerivationProgress:
    """How far a derivation is, in bytes of the model that it is made of; the last one has the artifact."""

    done_bytes: int
    total_bytes: int
    artifact: Artifact | None = None
    already_present: bool = False
    """Whether it had been made before."""


class DerivationMethods(RegistryConnection):
    """Derivations; see RegistryClient.

    Each goes on in the registry when the iteration is left, and tells how far it is until the last item.
    """

    def quantize(
        self, model: str, quantization: str, *, alias: str = "", timeout_s: float = LONG_S
    ) -> AsyncIterator[DerivationProgress]:
        """The model with weights of few bits: "int8", "int4" or "mxfp4"."""
        return self._derive(model, artifact_pb2.Derivation(quantization=quantization), alias, timeout_s)

    def convert(
        self, model: str, dtype: str, *, alias: str = "", timeout_s: float = LONG_S
    ) -> AsyncIterator[DerivationProgress]:
        """The model with weights in another type: "float32", "float16" or "bfloat16"."""
        return self._derive(model, artifact_pb2.Derivation(dtype=dtype), alias, timeout_s)

    def merge(
        self, model: str, adapter: str, *, alias: str = "", timeout_s: float = LONG_S
    ) -> AsyncIterator[DerivationProgress]:
        """The model with a LoRA adapter added to its weights: a folder on the registry's machine, as PEFT
        saves it."""
        merge = artifact_pb2.AdapterMerge(folder=adapter)
        return self._derive(model, artifact_pb2.Derivation(adapter_merge=merge), alias, timeout_s)

    async def _derive(
        self, model: str, derivation: artifact_pb2.Derivation, alias: str, timeout_s: float
    ) -> AsyncIterator[DerivationProgress]:
        request = derivation_pb2.DeriveArtifactRequest(
            request_id=uuid.uuid4().hex, model=model, derivation=derivation, alias=alias
        )
        operation = await self._call(lambda left_s: self._stub.DeriveArtifact(request, timeout=left_s))
        response = derivation_pb2.DeriveArtifactResponse()
        metadata = derivation_pb2.DeriveArtifactMetadata()
        async for running in self._follow(operation, response, timeout_s):
            running.metadata.Unpack(metadata)
            yield DerivationProgress(metadata.done_bytes, metadata.total_bytes)
        total = response.artifact.total_bytes
        artifact = artifact_from_proto(response.artifact)
        yield DerivationProgress(total, total, artifact, response.already_present)
