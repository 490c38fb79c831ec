"""Deployments, leases and changes between the registry's own types and the contract's messages."""

from __future__ import annotations

import time

from google.protobuf import duration_pb2
from google.rpc import status_pb2

from treadle.api.registry.v1 import deployment_pb2, lease_pb2, registry_pb2
from treadle.errors import BY_CODE, Internal, invalid_field
from treadle.rpc import from_status, to_status
from treadle_registry.catalog.aliases import Alias
from treadle_registry.eviction import EvictionPlan
from treadle_registry.rollout.changes import Change, Notice
from treadle_registry.rollout.deployment import Deployment, Target
from treadle_registry.rollout.lease import Configuration, Failure, Lease, Serving, ServingState
from treadle_registry.rollout.leasing import LeaseRequest
from treadle_registry.rollout.status import DeploymentView, TargetStatus
from treadle_registry.servicing.convert import alias_to_proto, timestamp_to_proto

_STATES = {
    lease_pb2.SERVING_STATE_LOADING: ServingState.LOADING,
    lease_pb2.SERVING_STATE_READY: ServingState.READY,
    lease_pb2.SERVING_STATE_DRAINING: ServingState.DRAINING,
    lease_pb2.SERVING_STATE_FAILED: ServingState.FAILED,
}
_STATES_TO_PROTO = {state: value for value, state in _STATES.items()}
_MAX_FAILURE = 512
"""Characters of a failure's text, which every watcher is sent."""


def deployment_from_proto(message: deployment_pb2.Deployment) -> Deployment:
    """What is wanted; what is output only is passed over. Zeros become what they stand for."""
    alone = len(message.targets) == 1
    return Deployment(
        alias=message.alias,
        targets=tuple(
            Target(
                target.artifact_digest,
                configuration_from_proto(target.configuration),
                target.weight or (1 if alone else 0),
            )
            for target in message.targets
        ),
        replicas=message.replicas or 1,
        warm_up_prompts=tuple(message.warm_up_prompts),
        etag=message.etag,
    )


def deployment_to_proto(view: DeploymentView) -> deployment_pb2.Deployment:
    """A deployment with how far the workers are."""
    deployment = view.deployment
    return deployment_pb2.Deployment(
        alias=deployment.alias,
        targets=map(_target_to_proto, deployment.targets),
        replicas=deployment.replicas,
        warm_up_prompts=deployment.warm_up_prompts,
        etag=deployment.etag,
        update_time=timestamp_to_proto(deployment.update_time),
        serving=map(_target_to_proto, deployment.serving),
        status=map(_status_to_proto, view.status),
        settled=deployment.settled,
    )


def _target_to_proto(target: Target) -> deployment_pb2.DeploymentTarget:
    return deployment_pb2.DeploymentTarget(
        artifact_digest=target.digest,
        configuration=_configuration_to_proto(target.configuration),
        weight=target.weight,
    )


def _status_to_proto(status: TargetStatus) -> deployment_pb2.TargetStatus:
    return deployment_pb2.TargetStatus(
        artifact_digest=status.digest,
        configuration=_configuration_to_proto(status.configuration),
        profile=status.profile,
        loading_workers=status.loading,
        ready_workers=status.ready,
        draining_workers=status.draining,
        failed_workers=status.failed,
        error=_failure_to_proto(status.failure) if status.failure else None,
    )


def configuration_from_proto(message: deployment_pb2.ServingConfiguration) -> Configuration:
    """How a model is to be computed."""
    return Configuration(message.dtype, message.quantization, message.cache_dtype)


def _configuration_to_proto(configuration: Configuration) -> deployment_pb2.ServingConfiguration:
    return deployment_pb2.ServingConfiguration(
        dtype=configuration.dtype,
        quantization=configuration.quantization,
        cache_dtype=configuration.cache_dtype,
    )


def _failure_to_proto(failure: Failure) -> status_pb2.Status:
    return to_status(BY_CODE.get(failure.code, Internal)(failure.message, reason=failure.reason))


def lease_request_from_proto(request: lease_pb2.AcquireLeaseRequest) -> LeaseRequest:
    """What is asked for; raises InvalidArgument for a worker's lease without a state."""
    return LeaseRequest(
        digest=request.artifact_digest,
        holder=request.holder,
        request_id=request.request_id,
        time_to_live_s=seconds_from_proto(request.time_to_live) if request.HasField("time_to_live") else None,
        serving=serving_from_proto(request.serving) if request.HasField("serving") else None,
    )


def seconds_from_proto(duration: duration_pb2.Duration) -> float:
    """Seconds of a duration; its fields may be anything."""
    return duration.seconds + duration.nanos / 1e9


def serving_from_proto(message: lease_pb2.ServingLease) -> Serving:
    """A worker's part of a lease; raises InvalidArgument without a state."""
    state = _STATES.get(message.state)
    if state is None:
        raise invalid_field("serving.state", "must be LOADING, READY, DRAINING or FAILED")
    failure = None
    if state is ServingState.FAILED:
        error = from_status(message.error)
        failure = Failure(error.code, error.message[:_MAX_FAILURE], error.reason[:64])
    return Serving(configuration_from_proto(message.configuration), state, message.alias, failure)


def lease_to_proto(lease: Lease, now: float) -> lease_pb2.Lease:
    """A lease; `now` is the monotonic time."""
    serving = lease.serving
    return lease_pb2.Lease(
        lease_id=lease.lease_id,
        artifact_digest=lease.digest,
        holder=lease.holder,
        expire_time=timestamp_to_proto(time.time() + lease.deadline - now),
        serving=_serving_to_proto(serving) if serving else None,
    )


def _serving_to_proto(serving: Serving) -> lease_pb2.ServingLease:
    return lease_pb2.ServingLease(
        configuration=_configuration_to_proto(serving.configuration),
        state=_STATES_TO_PROTO[serving.state],
        alias=serving.alias,
        error=_failure_to_proto(serving.failure) if serving.failure else None,
    )


def notice_to_proto(notice: Notice) -> registry_pb2.WatchModelsResponse:
    """What a watcher is told."""
    response = registry_pb2.WatchModelsResponse(version=notice.version)
    match notice.content:
        case "reset":
            response.reset = True
        case "complete":
            response.complete = True
        case Change(value=Alias() as alias):
            response.alias.CopyFrom(alias_to_proto(alias))
        case Change(value=DeploymentView() as view):
            response.deployment.CopyFrom(deployment_to_proto(view))
        case Change(kind="alias", name=name):
            response.deleted_alias = name
        case Change(kind="deployment", name=name):
            response.deleted_deployment = name
    return response


def eviction_to_proto(plan: EvictionPlan) -> lease_pb2.EvictArtifactsResponse:
    """What goes and what stays."""
    return lease_pb2.EvictArtifactsResponse(
        evictions=[
            lease_pb2.Eviction(
                artifact_digest=fate.digest,
                bytes=fate.size,
                reason=fate.reason,
                kept=fate.kept,
                last_use_time=timestamp_to_proto(fate.last_use_time),
            )
            for fate in plan.fates
        ],
        store_bytes_before=plan.bytes_before,
        store_bytes_after=plan.bytes_after,
    )
