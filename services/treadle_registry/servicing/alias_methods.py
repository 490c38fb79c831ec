"""Aliases."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle_registry.registry import Registry
from treadle_registry.servicing.convert import alias_to_proto


class AliasMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Names for artifacts."""

    _registry: Registry

    async def SetAlias(
        self, request: registry_pb2.SetAliasRequest, context: object
    ) -> registry_pb2.SetAliasResponse:
        """Creates or moves an alias."""
        alias = await self._registry.set_alias(request.name, request.artifact_digest, request.etag)
        return registry_pb2.SetAliasResponse(alias=alias_to_proto(alias))

    async def ListAliases(
        self, request: registry_pb2.ListAliasesRequest, context: object
    ) -> registry_pb2.ListAliasesResponse:
        """A page of aliases."""
        page, token = await self._registry.aliases(request.page_size, request.page_token)
        return registry_pb2.ListAliasesResponse(aliases=map(alias_to_proto, page), next_page_token=token)

    async def DeleteAlias(
        self, request: registry_pb2.DeleteAliasRequest, context: object
    ) -> registry_pb2.DeleteAliasResponse:
        """Forgets an alias."""
        await self._registry.delete_alias(request.name, request.etag)
        return registry_pb2.DeleteAliasResponse()

    async def GetAliasHistory(
        self, request: registry_pb2.GetAliasHistoryRequest, context: object
    ) -> registry_pb2.GetAliasHistoryResponse:
        """Where an alias has pointed."""
        page, token = await self._registry.alias_history(request.name, request.page_size, request.page_token)
        return registry_pb2.GetAliasHistoryResponse(entries=map(alias_to_proto, page), next_page_token=token)
