"""Between the contract's messages and what the client tells of deployments, leases and evictions."""

from __future__ import annotations

from treadle.api.registry.v1 import deployment_pb2, lease_pb2, registry_pb2
from treadle.client.artifact import Alias
from treadle.client.convert_artifact import time_from_proto
from treadle.client.deployment import (
    Deployment,
    DeploymentTarget,
    Eviction,
    Evictions,
    Lease,
    ModelChange,
    Promotion,
    TargetStatus,
)
from treadle.deployments import ServingConfiguration


def deployment_to_proto(deployment: Deployment) -> deployment_pb2.Deployment:
    """What is wanted, and the etag; nothing of what only the registry says."""
    return deployment_pb2.Deployment(
        alias=deployment.alias,
        targets=[
            deployment_pb2.DeploymentTarget(
                artifact_digest=target.artifact_digest,
                configuration=configuration_to_proto(target.configuration),
                weight=target.weight,
            )
            for target in deployment.targets
        ],
        replicas=deployment.replicas,
        warm_up_prompts=deployment.warm_up_prompts,
        etag=deployment.etag,
    )


def deployment_from_proto(message: deployment_pb2.Deployment) -> Deployment:
    """A deployment as the registry says it."""
    return Deployment(
        alias=message.alias,
        targets=tuple(map(_target, message.targets)),
        replicas=message.replicas,
        warm_up_prompts=tuple(message.warm_up_prompts),
        serving=tuple(map(_target, message.serving)),
        status=tuple(map(_status, message.status)),
        settled=message.settled,
        etag=message.etag,
        update_time=time_from_proto(message.update_time),
    )


def _target(message: deployment_pb2.DeploymentTarget) -> DeploymentTarget:
    return DeploymentTarget(message.artifact_digest, _configuration(message.configuration), message.weight)


def configuration_to_proto(configuration: ServingConfiguration) -> deployment_pb2.ServingConfiguration:
    """How a model is to be computed."""
    return deployment_pb2.ServingConfiguration(
        dtype=configuration.dtype,
        quantization=configuration.quantization,
        cache_dtype=configuration.cache_dtype,
    )


def _configuration(message: deployment_pb2.ServingConfiguration) -> ServingConfiguration:
    return ServingConfiguration(message.dtype, message.quantization, message.cache_dtype)


def _status(message: deployment_pb2.TargetStatus) -> TargetStatus:
    return TargetStatus(
        message.artifact_digest,
        _configuration(message.configuration),
        message.profile,
        message.loading_workers,
        message.ready_workers,
        message.draining_workers,
        message.failed_workers,
        message.error.message,
    )


def promotion_from_proto(
    message: registry_pb2.PromoteAliasResponse | registry_pb2.RollBackAliasResponse,
) -> Promotion:
    """What a promotion has come to by now."""
    return Promotion(
        alias_from_proto(message.alias) if message.HasField("alias") else None,
        deployment_from_proto(message.deployment) if message.HasField("deployment") else None,
    )


def change_from_proto(message: registry_pb2.WatchModelsResponse) -> ModelChange:
    """What a watch says."""
    kind = message.WhichOneof("change")
    return ModelChange(
        message.version,
        alias=alias_from_proto(message.alias) if kind == "alias" else None,
        deleted_alias=message.deleted_alias,
        deployment=deployment_from_proto(message.deployment) if kind == "deployment" else None,
        deleted_deployment=message.deleted_deployment,
        reset=message.reset,
        complete=message.complete,
    )


def lease_from_proto(message: lease_pb2.Lease) -> Lease:
    """A lease."""
    expire_time = time_from_proto(message.expire_time)
    if not message.HasField("serving"):
        return Lease(message.lease_id, message.artifact_digest, message.holder, expire_time)
    state = lease_pb2.ServingState.Name(message.serving.state).removeprefix("SERVING_STATE_").lower()
    return Lease(
        message.lease_id,
        message.artifact_digest,
        message.holder,
        expire_time,
        state,
        message.serving.alias,
        _configuration(message.serving.configuration),
    )


def evictions_from_proto(message: lease_pb2.EvictArtifactsResponse) -> Evictions:
    """What goes and what stays."""
    return Evictions(
        tuple(
            Eviction(
                entry.artifact_digest,
                entry.bytes,
                entry.reason,
                entry.kept,
                time_from_proto(entry.last_use_time),
            )
            for entry in message.evictions
        ),
        message.store_bytes_before,
        message.store_bytes_after,
    )


def alias_from_proto(alias: registry_pb2.Alias) -> Alias:
    """An alias."""
    return Alias(alias.name, alias.artifact_digest, alias.etag, time_from_proto(alias.update_time))
