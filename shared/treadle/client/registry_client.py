"""The asynchronous client of the registry."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from google.longrunning import operations_proto_pb2

from treadle.api.registry.v1 import registry_pb2
from treadle.client.artifact import Alias, Artifact, ImportProgress, ModelSource
from treadle.client.convert_artifact import artifact_from_proto, set_source
from treadle.client.deployment_convert import alias_from_proto
from treadle.client.deployment_methods import DeploymentMethods
from treadle.client.derivation import DerivationMethods
from treadle.client.planning import PlanningMethods
from treadle.client.registry_connection import LONG_S, pages
from treadle.client.transfers import TransferMethods, Upload
from treadle.client.verification import VerificationMethods


class RegistryClient(
    VerificationMethods, DerivationMethods, DeploymentMethods, PlanningMethods, TransferMethods
):
    """Asks a registry. Every method raises TreadleError."""

    async def import_model(
        self, source: ModelSource, *, alias: str = "", timeout_s: float = LONG_S
    ) -> AsyncIterator[ImportProgress]:
        """Imports a model and tells how far it is, until the last item, which has the artifact.

        The import goes on in the registry when the iteration is left.
        """
        request = registry_pb2.ImportModelRequest(request_id=uuid.uuid4().hex, alias=alias)
        set_source(request, source)
        async for progress in self._import(request, timeout_s):
            yield progress

    async def upload_model(
        self, path: str | Path, *, alias: str = "", timeout_s: float = LONG_S
    ) -> AsyncIterator[ImportProgress]:
        """Sends a Hugging Face folder or a .gguf file of this machine to the registry, which imports it.

        Tells how far it is, as `import_model` does. What arrived stays there for a day: called again, by
        whichever process, it goes on where it was cut off.
        """
        upload = Upload(self._stub, path)
        async for progress in upload.run():
            yield progress
        request = registry_pb2.ImportModelRequest(
            request_id=uuid.uuid4().hex, alias=alias, uploaded=upload.source()
        )
        async for progress in self._import(request, timeout_s):
            yield progress

    async def _import(
        self, request: registry_pb2.ImportModelRequest, timeout_s: float
    ) -> AsyncIterator[ImportProgress]:
        operation = await self._call(lambda left_s: self._stub.ImportModel(request, timeout=left_s))
        response = registry_pb2.ImportModelResponse()
        async for running in self._follow(operation, response, timeout_s):
            yield _progress(running)
        total = response.artifact.total_bytes
        artifact = artifact_from_proto(response.artifact)
        yield ImportProgress("done", total, total, artifact, response.already_present)

    async def resolve(self, model: str) -> Artifact:
        """What an alias or digest means now; raises NotFound."""
        request = registry_pb2.ResolveModelRequest(model=model)
        response = await self._call(lambda left_s: self._stub.ResolveModel(request, timeout=left_s))
        return artifact_from_proto(response.artifact)

    async def artifacts(self) -> list[Artifact]:
        """Everything in the store."""

        async def page(token: str) -> registry_pb2.ListArtifactsResponse:
            request = registry_pb2.ListArtifactsRequest(page_token=token)
            return await self._call(lambda left_s: self._stub.ListArtifacts(request, timeout=left_s))

        return [artifact_from_proto(item) async for response in pages(page) for item in response.artifacts]

    async def aliases(self) -> list[Alias]:
        """Every alias."""

        async def page(token: str) -> registry_pb2.ListAliasesResponse:
            request = registry_pb2.ListAliasesRequest(page_token=token)
            return await self._call(lambda left_s: self._stub.ListAliases(request, timeout=left_s))

        return [alias_from_proto(item) async for response in pages(page) for item in response.aliases]

    async def alias_history(self, name: str) -> list[Alias]:
        """Where an alias has pointed, newest first."""

        async def page(token: str) -> registry_pb2.GetAliasHistoryResponse:
            request = registry_pb2.GetAliasHistoryRequest(name=name, page_token=token)
            return await self._call(lambda left_s: self._stub.GetAliasHistory(request, timeout=left_s))

        return [alias_from_proto(item) async for response in pages(page) for item in response.entries]

    async def set_alias(self, name: str, digest: str, *, etag: str = "") -> Alias:
        """Creates or moves an alias; with an etag, raises Aborted when it has moved meanwhile."""
        request = registry_pb2.SetAliasRequest(name=name, artifact_digest=digest, etag=etag)
        response = await self._call(lambda left_s: self._stub.SetAlias(request, timeout=left_s))
        return alias_from_proto(response.alias)

    async def delete_alias(self, name: str) -> None:
        """Forgets an alias; the artifact stays."""
        request = registry_pb2.DeleteAliasRequest(name=name)
        await self._call(lambda left_s: self._stub.DeleteAlias(request, timeout=left_s))

    async def delete_artifact(self, digest: str) -> int:
        """Removes an artifact that nothing holds; gives the freed bytes."""
        request = registry_pb2.DeleteArtifactRequest(digest=digest)
        response = await self._call(lambda left_s: self._stub.DeleteArtifact(request, timeout=left_s))
        return response.freed_bytes


def _progress(operation: operations_proto_pb2.Operation) -> ImportProgress:
    metadata = registry_pb2.ImportModelMetadata()
    operation.metadata.Unpack(metadata)
    stage = registry_pb2.ImportStage.Name(metadata.stage).removeprefix("IMPORT_STAGE_").lower()
    return ImportProgress(
        stage,
        metadata.done_bytes,
        metadata.total_bytes,
        done_files=metadata.done_files,
        total_files=metadata.total_files,
    )
