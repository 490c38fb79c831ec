"""Leases, and what goes when room is needed."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from treadle.api.registry.v1 import lease_pb2, registry_pb2_grpc
from treadle.security import Role, current_principal
from treadle_registry.eviction import Eviction
from treadle_registry.pages import page_of, page_size, read_token
from treadle_registry.registry import Registry
from treadle_registry.servicing.convert_rollout import (
    eviction_to_proto,
    lease_request_from_proto,
    lease_to_proto,
    seconds_from_proto,
    serving_from_proto,
)

_WORKERS = frozenset({Role.SERVE})
"""Who may say that a worker is ready: an alias moves by that."""


class LeaseMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Gives, renews and ends leases; evicts what nothing holds."""

    _registry: Registry
    _eviction: Eviction

    async def AcquireLease(
        self, request: lease_pb2.AcquireLeaseRequest, context: object
    ) -> lease_pb2.AcquireLeaseResponse:
        """Holds an artifact."""
        asked = lease_request_from_proto(request)
        if asked.serving is not None:
            current_principal().require(_WORKERS, "a lease that serves")
        lease = await self._registry.in_thread(self._registry.leasing.acquire, asked)
        self._registry.uses.touch(lease.digest)
        return lease_pb2.AcquireLeaseResponse(lease=lease_to_proto(lease, self._registry.rollouts.clock()))

    async def RenewLease(
        self, request: lease_pb2.RenewLeaseRequest, context: object
    ) -> lease_pb2.RenewLeaseResponse:
        """Holds it for another while, and says what the holder does with it."""
        time_to_live_s = (
            seconds_from_proto(request.time_to_live) if request.HasField("time_to_live") else None
        )
        serving = serving_from_proto(request.serving) if request.HasField("serving") else None
        self._check_holder(request.lease_id)
        lease = await self._registry.in_thread(
            self._registry.leasing.renew, request.lease_id, time_to_live_s, serving
        )
        self._registry.uses.touch(lease.digest)
        return lease_pb2.RenewLeaseResponse(lease=lease_to_proto(lease, self._registry.rollouts.clock()))

    async def ReleaseLease(
        self, request: lease_pb2.ReleaseLeaseRequest, context: object
    ) -> lease_pb2.ReleaseLeaseResponse:
        """Lets it go."""
        self._check_holder(request.lease_id)
        await self._registry.in_thread(self._registry.leasing.release, request.lease_id)
        return lease_pb2.ReleaseLeaseResponse()

    async def ListLeases(
        self, request: lease_pb2.ListLeasesRequest, context: object
    ) -> lease_pb2.ListLeasesResponse:
        """A page of live leases."""
        listing = f"leases/{request.artifact_digest}"
        limit, after = page_size(request.page_size), int(read_token(request.page_token, listing, 0))
        rows = await self._registry.in_thread(
            self._registry.leasing.page, after, limit + 1, request.artifact_digest
        )
        page, token = page_of(rows, limit, listing, lambda lease: lease.number)
        now = self._registry.rollouts.clock()
        return lease_pb2.ListLeasesResponse(
            leases=[lease_to_proto(lease, now) for lease in page], next_page_token=token
        )

    def _check_holder(self, lease_id: str) -> None:
        """Raises PermissionDenied where it is a worker's and the caller may not be one."""
        lease = self._registry.rollouts.book.get(lease_id)
        if lease is not None and lease.serving is not None:
            current_principal().require(_WORKERS, "a lease that serves")

    async def EvictArtifacts(
        self, request: lease_pb2.EvictArtifactsRequest, context: object
    ) -> lease_pb2.EvictArtifactsResponse:
        """Makes room, or says what would go."""
        target = request.target_bytes if request.HasField("target_bytes") else None
        return eviction_to_proto(await self._eviction.evict(target, dry_run=request.dry_run))
