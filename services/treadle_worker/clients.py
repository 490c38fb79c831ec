"""What the worker asks of other services."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import grpc
from google.protobuf import duration_pb2

from treadle.api.registry.v1 import lease_pb2, registry_pb2, registry_pb2_grpc
from treadle.rpc import from_rpc_error
from treadle_worker.convert import to_artifact, to_known_lease, to_serving_lease
from treadle_worker.jobs import Artifact
from treadle_worker.models.leases import KnownLease, Served

TIMEOUT_S = 10.0
LEASE_TIMEOUT_S = 5.0
_PAGE = 500

T = TypeVar("T")


class RegistryClient:
    """The registry, over a channel that the caller closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)

    async def resolve(self, model: str) -> Artifact:
        """The artifact that an alias or digest means; raises NotFound, Unavailable and others."""
        request = registry_pb2.ResolveModelRequest(model=model)
        response = await _called(self._stub.ResolveModel(request, timeout=TIMEOUT_S))
        return to_artifact(response.artifact)

    async def acquire_lease(
        self, request_id: str, served: Served, *, holder: str, time_to_live_s: float
    ) -> str:
        """See Leases."""
        request = lease_pb2.AcquireLeaseRequest(
            request_id=request_id,
            artifact_digest=served.artifact_digest,
            holder=holder,
            time_to_live=_duration(time_to_live_s),
            serving=to_serving_lease(served),
        )
        response = await _called(self._stub.AcquireLease(request, timeout=LEASE_TIMEOUT_S))
        return response.lease.lease_id

    async def renew_lease(self, lease_id: str, served: Served, *, time_to_live_s: float) -> None:
        """See Leases."""
        request = lease_pb2.RenewLeaseRequest(
            lease_id=lease_id,
            time_to_live=_duration(time_to_live_s),
            serving=to_serving_lease(served),
        )
        await _called(self._stub.RenewLease(request, timeout=LEASE_TIMEOUT_S))

    async def release_lease(self, lease_id: str) -> None:
        """See Leases."""
        request = lease_pb2.ReleaseLeaseRequest(lease_id=lease_id)
        await _called(self._stub.ReleaseLease(request, timeout=LEASE_TIMEOUT_S))

    async def leases(self, artifact_digest: str) -> list[KnownLease]:
        """See Leases."""
        found: list[KnownLease] = []
        token = ""
        while True:
            request = lease_pb2.ListLeasesRequest(
                page_size=_PAGE, page_token=token, artifact_digest=artifact_digest
            )
            response = await _called(self._stub.ListLeases(request, timeout=LEASE_TIMEOUT_S))
            found += [to_known_lease(lease) for lease in response.leases if lease.HasField("serving")]
            token = response.next_page_token
            if not token:
                return found


async def _called(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
