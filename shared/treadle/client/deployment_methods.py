"""Deployments, promotions, watches, leases and evictions, asked of a registry."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncGenerator

import grpc

from treadle.api.registry.v1 import deployment_pb2, lease_pb2, registry_pb2
from treadle.client.convert import duration_to_proto
from treadle.client.deployment import Deployment, Evictions, Lease, ModelChange, Promotion
from treadle.client.deployment_convert import (
    change_from_proto,
    deployment_from_proto,
    deployment_to_proto,
    evictions_from_proto,
    lease_from_proto,
    promotion_from_proto,
)
from treadle.client.reconnect import Reconnects
from treadle.client.registry_connection import RegistryConnection, pages

_RECONNECTS = 6


class DeploymentMethods(RegistryConnection):
    """Deployments and leases; see RegistryClient."""

    async def set_deployment(self, deployment: Deployment) -> Deployment:
        """Says what is wanted; with an etag, raises Aborted when somebody else has meanwhile."""
        request = deployment_pb2.SetDeploymentRequest(deployment=deployment_to_proto(deployment))
        response = await self._call(lambda left_s: self._stub.SetDeployment(request, timeout=left_s))
        return deployment_from_proto(response.deployment)

    async def deployment(self, alias: str) -> Deployment:
        """What is wanted and served under an alias; raises NotFound."""
        request = deployment_pb2.GetDeploymentRequest(alias=alias)
        response = await self._call(lambda left_s: self._stub.GetDeployment(request, timeout=left_s))
        return deployment_from_proto(response.deployment)

    async def deployments(self) -> list[Deployment]:
        """Every deployment."""

        async def page(token: str) -> deployment_pb2.ListDeploymentsResponse:
            request = deployment_pb2.ListDeploymentsRequest(page_token=token)
            return await self._call(lambda left_s: self._stub.ListDeployments(request, timeout=left_s))

        found = [item async for response in pages(page) for item in response.deployments]
        return [deployment_from_proto(item) for item in found]

    async def delete_deployment(self, alias: str, *, etag: str = "") -> None:
        """Has workers let go of the models; the alias stays."""
        request = deployment_pb2.DeleteDeploymentRequest(alias=alias, etag=etag)
        await self._call(lambda left_s: self._stub.DeleteDeployment(request, timeout=left_s))

    async def promote(self, name: str, model: str, *, etag: str = "") -> Promotion:
        """Makes `model`, an alias or digest, what the alias `name` means.

        Once a worker is ready for it where workers serve the alias, else at once. With an etag, raises
        Aborted when the alias has moved meanwhile.
        """
        request = registry_pb2.PromoteAliasRequest(name=name, model=model, etag=etag)
        return promotion_from_proto(
            await self._call(lambda left_s: self._stub.PromoteAlias(request, timeout=left_s))
        )

    async def roll_back(self, name: str, *, steps: int = 1, etag: str = "") -> Promotion:
        """Promotes what the alias meant before, `steps` different artifacts back."""
        request = registry_pb2.RollBackAliasRequest(name=name, steps=steps, etag=etag)
        return promotion_from_proto(
            await self._call(lambda left_s: self._stub.RollBackAlias(request, timeout=left_s))
        )

    async def watch_models(self, version: str = "") -> AsyncGenerator[ModelChange, None]:
        """Aliases and deployments as they change after `version`; at first, and after a long absence, all.

        Goes on across restarts of the registry, for ever; raises TreadleError when it stays away.
        """
        reconnects = Reconnects(_RECONNECTS, math.inf)
        while True:
            call = self._stub.WatchModels(registry_pb2.WatchModelsRequest(version=version))
            try:
                async for response in call:
                    reconnects.progress()
                    version = response.version
                    if response.WhichOneof("change"):
                        yield change_from_proto(response)
            except grpc.aio.AioRpcError as error:
                await reconnects.pause(error)
            finally:
                call.cancel()

    async def acquire_lease(
        self, artifact_digest: str, holder: str, *, time_to_live_s: float = 60.0, request_id: str = ""
    ) -> Lease:
        """Keeps an artifact from being evicted; `holder` says to people who does."""
        request = lease_pb2.AcquireLeaseRequest(
            request_id=request_id or uuid.uuid4().hex,
            artifact_digest=artifact_digest,
            holder=holder,
            time_to_live=duration_to_proto(time_to_live_s),
        )
        response = await self._call(lambda left_s: self._stub.AcquireLease(request, timeout=left_s))
        return lease_from_proto(response.lease)

    async def renew_lease(self, lease_id: str, *, time_to_live_s: float | None = None) -> Lease:
        """Holds it for another while; raises NotFound when it has lapsed."""
        request = lease_pb2.RenewLeaseRequest(
            lease_id=lease_id,
            time_to_live=None if time_to_live_s is None else duration_to_proto(time_to_live_s),
        )
        response = await self._call(lambda left_s: self._stub.RenewLease(request, timeout=left_s))
        return lease_from_proto(response.lease)

    async def release_lease(self, lease_id: str) -> None:
        """Lets it go; raises NotFound when it has lapsed."""
        request = lease_pb2.ReleaseLeaseRequest(lease_id=lease_id)
        await self._call(lambda left_s: self._stub.ReleaseLease(request, timeout=left_s))

    async def leases(self, artifact_digest: str = "") -> list[Lease]:
        """Live leases, on one artifact or on all."""

        async def page(token: str) -> lease_pb2.ListLeasesResponse:
            request = lease_pb2.ListLeasesRequest(page_token=token, artifact_digest=artifact_digest)
            return await self._call(lambda left_s: self._stub.ListLeases(request, timeout=left_s))

        return [lease_from_proto(item) async for response in pages(page) for item in response.leases]

    async def evict(self, target_bytes: int | None = None, *, dry_run: bool = False) -> Evictions:
        """Deletes what was used least recently until the store has `target_bytes` (None: its quota).

        What is leased, aliased or deployed stays; a dry run only says what would go. Raises Unavailable
        (LEASES_UNKNOWN) soon after the registry's start.
        """
        request = lease_pb2.EvictArtifactsRequest(target_bytes=target_bytes, dry_run=dry_run)
        response = await self._call(lambda left_s: self._stub.EvictArtifacts(request, timeout=left_s))
        return evictions_from_proto(response)
