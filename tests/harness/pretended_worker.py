"""A worker as the registry sees one: leases, and nothing behind them."""

from __future__ import annotations

from typing import Any

from registry_stubs import RegistryStubs

from treadle.api.registry.v1 import deployment_pb2, lease_pb2

LOADING = lease_pb2.SERVING_STATE_LOADING
READY = lease_pb2.SERVING_STATE_READY
DRAINING = lease_pb2.SERVING_STATE_DRAINING
FAILED = lease_pb2.SERVING_STATE_FAILED
SECOND = {"seconds": 1}


def targets(*digests: str, weight: int = 1) -> list[deployment_pb2.DeploymentTarget]:
    """Targets of equal weight."""
    return [deployment_pb2.DeploymentTarget(artifact_digest=digest, weight=weight) for digest in digests]


async def deploy(client: RegistryStubs, alias: str, *digests: str, **fields: Any) -> Any:
    """Wants them, and gives the deployment."""
    wanted = deployment_pb2.Deployment(alias=alias, targets=targets(*digests), **fields)
    return (await client.call("SetDeployment", deployment=wanted)).deployment


def serving(alias: str, state: int, **fields: Any) -> lease_pb2.ServingLease:
    """A worker's part of a lease."""
    configuration = deployment_pb2.ServingConfiguration(dtype="bfloat16")
    return lease_pb2.ServingLease(configuration=configuration, state=state, alias=alias, **fields)


async def lease(
    client: RegistryStubs, digest: str, alias: str, state: int = READY, holder: str = "worker", **fields: Any
) -> Any:
    """A worker's lease."""
    answer = await client.call(
        "AcquireLease", artifact_digest=digest, holder=holder, serving=serving(alias, state), **fields
    )
    return answer.lease


async def becomes(client: RegistryStubs, held: Any, state: int, **fields: Any) -> Any:
    """The worker says what it does now."""
    answer = await client.call(
        "RenewLease", lease_id=held.lease_id, serving=serving(held.serving.alias, state, **fields)
    )
    return answer.lease
