"""Aliases and deployments as they change."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle_registry.registry import Registry
from treadle_registry.servicing.convert_rollout import notice_to_proto


class WatchMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Tells whoever follows."""

    _registry: Registry

    async def WatchModels(
        self, request: registry_pb2.WatchModelsRequest, context: object
    ) -> AsyncIterator[registry_pb2.WatchModelsResponse]:
        """Changes after a version, until somebody ends it."""
        async with contextlib.aclosing(self._registry.changes.watch(request.version)) as notices:
            async for notice in notices:
                yield notice_to_proto(notice)
