"""Deployments, and aliases that follow them."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from treadle.api.registry.v1 import deployment_pb2, registry_pb2, registry_pb2_grpc
from treadle.errors import invalid_field
from treadle_registry.pages import page_of, page_size, read_token
from treadle_registry.registry import Registry
from treadle_registry.rollout.status import DeploymentView
from treadle_registry.servicing.convert import alias_to_proto
from treadle_registry.servicing.convert_rollout import deployment_from_proto, deployment_to_proto
from treadle_registry.servicing.page_bytes import page_in_bytes

_MOST_STEPS = 1000


class DeploymentMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Says what is wanted, promotes and rolls back."""

    _registry: Registry

    async def SetDeployment(
        self, request: deployment_pb2.SetDeploymentRequest, context: object
    ) -> deployment_pb2.SetDeploymentResponse:
        """Says what is wanted under an alias."""
        wanted = deployment_from_proto(request.deployment)
        view = await self._registry.in_thread(self._registry.deploying.set_deployment, wanted)
        return deployment_pb2.SetDeploymentResponse(deployment=deployment_to_proto(view))

    async def GetDeployment(
        self, request: deployment_pb2.GetDeploymentRequest, context: object
    ) -> deployment_pb2.GetDeploymentResponse:
        """A deployment and how far the workers are."""
        view = await self._registry.in_thread(self._registry.deploying.get_deployment, request.alias)
        return deployment_pb2.GetDeploymentResponse(deployment=deployment_to_proto(view))

    async def ListDeployments(
        self, request: deployment_pb2.ListDeploymentsRequest, context: object
    ) -> deployment_pb2.ListDeploymentsResponse:
        """A page of deployments."""
        limit = page_size(request.page_size)
        after = str(read_token(request.page_token, "deployments", ""))
        rows = await self._registry.in_thread(self._registry.deploying.deployments, after, limit + 1)
        page, token = page_of(rows, limit, "deployments", _alias)
        deployments, token = page_in_bytes(page, token, "deployments", _alias, deployment_to_proto)
        return deployment_pb2.ListDeploymentsResponse(deployments=deployments, next_page_token=token)

    async def DeleteDeployment(
        self, request: deployment_pb2.DeleteDeploymentRequest, context: object
    ) -> deployment_pb2.DeleteDeploymentResponse:
        """Forgets what is wanted; the alias stays."""
        await self._registry.in_thread(
            self._registry.deploying.delete_deployment, request.alias, request.etag
        )
        return deployment_pb2.DeleteDeploymentResponse()

    async def PromoteAlias(
        self, request: registry_pb2.PromoteAliasRequest, context: object
    ) -> registry_pb2.PromoteAliasResponse:
        """Makes an artifact what an alias means, once a worker is ready where workers serve it."""
        promotion = await self._registry.in_thread(
            self._registry.deploying.promote, request.name, request.model, request.etag
        )
        return registry_pb2.PromoteAliasResponse(
            alias=alias_to_proto(promotion.alias) if promotion.alias else None,
            deployment=deployment_to_proto(promotion.deployment) if promotion.deployment else None,
        )

    async def RollBackAlias(
        self, request: registry_pb2.RollBackAliasRequest, context: object
    ) -> registry_pb2.RollBackAliasResponse:
        """Promotes what the alias meant before."""
        if request.steps > _MOST_STEPS:
            raise invalid_field("steps", f"must be at most {_MOST_STEPS}; got {request.steps}")
        promotion = await self._registry.in_thread(
            self._registry.deploying.roll_back, request.name, request.etag, request.steps or 1
        )
        return registry_pb2.RollBackAliasResponse(
            alias=alias_to_proto(promotion.alias) if promotion.alias else None,
            deployment=deployment_to_proto(promotion.deployment) if promotion.deployment else None,
        )


def _alias(view: DeploymentView) -> str:
    return view.deployment.alias
