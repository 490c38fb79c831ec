"""Having a store's files hashed again."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from treadle.api.registry.v1 import registry_pb2
from treadle.client.registry_connection import LONG_S, RegistryConnection


@dataclass(frozen=True, slots=True)
class DamagedFile:
    """A file that is not what its artifact's manifest says."""

    artifact_digest: str
    path: str
    expected_digest: str
    """Empty for a file that belongs to nothing, and for a manifest."""
    found_digest: str
    """Empty where it is missing or cannot be read."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How far it is; the last one is `done` and has what is damaged."""

    done_bytes: int
    total_bytes: int
    artifacts: int
    damaged_files: tuple[DamagedFile, ...] = ()
    done: bool = False


class VerificationMethods(RegistryConnection):
    """Verification; see RegistryClient."""

    async def verify(self, digest: str = "", *, timeout_s: float = LONG_S) -> AsyncIterator[Verification]:
        """Has an artifact's files hashed again, or every artifact's, and tells how far it is, until the last
        item, which is `done` and has what is damaged."""
        request = registry_pb2.VerifyArtifactRequest(request_id=uuid.uuid4().hex, digest=digest)
        operation = await self._call(lambda left_s: self._stub.VerifyArtifact(request, timeout=left_s))
        response = registry_pb2.VerifyArtifactResponse()
        metadata = registry_pb2.VerifyArtifactMetadata()
        async for running in self._follow(operation, response, timeout_s):
            running.metadata.Unpack(metadata)
            yield Verification(metadata.done_bytes, metadata.total_bytes, metadata.total_artifacts)
        damaged = tuple(
            DamagedFile(file.artifact_digest, file.path, file.expected_digest, file.found_digest)
            for file in response.damaged_files
        )
        size = response.verified_bytes
        yield Verification(size, size, response.verified_artifacts, damaged, done=True)
