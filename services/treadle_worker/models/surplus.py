"""Whether a model that nobody named here is served by enough others."""

from __future__ import annotations

from redis.asyncio import Redis

from treadle.deployments import Deployment
from treadle.errors import TreadleError
from treadle_worker.models.holding import Holding
from treadle_worker.models.registry import Registry
from treadle_worker.models.retirement import another_ready


class Surplus:
    """Judges holdings that have their place by a lease alone."""

    def __init__(self, registry: Registry, redis: Redis, consumer: str) -> None:
        self._registry = registry
        self._redis = redis
        self._consumer = consumer

    async def has(self, holding: Holding, deployment: Deployment | None) -> bool:
        """Whether the holding is to be let go; what cannot be known now is asked again the next time."""
        if holding.claim.required or deployment is None:
            return False
        try:
            if holding.keeper.refusal is not None:
                return await self._is_replaced(holding)
            return await self._is_too_many(holding, deployment.replicas)
        except TreadleError:
            return False

    async def _is_replaced(self, holding: Holding) -> bool:
        """The registry has given the place to another worker: that one must be ready first."""
        if holding.host is None or not holding.is_ready:
            return True
        return await another_ready(self._redis, holding.host.profile, self._consumer)

    async def _is_too_many(self, holding: Holding, replicas: int) -> bool:
        """Where fewer are wanted than before, those that are ready stay first, and of them the oldest."""
        if holding.replicas == replicas:
            return holding.surplus
        if replicas < holding.replicas:
            holding.surplus = await self._is_beyond(holding, replicas)
        else:
            holding.surplus = False
        holding.replicas = replicas
        return holding.surplus

    async def _is_beyond(self, holding: Holding, replicas: int) -> bool:
        leases = await self._registry.leases(holding.claim.artifact_digest)
        mine = holding.served()
        places = [
            lease
            for lease in leases
            if (lease.alias, lease.configuration) == (mine.alias, mine.configuration)
            and lease.state != "draining"
        ]
        # Sorting keeps the order of those that are equal: the oldest first, as the registry lists them.
        places.sort(key=lambda lease: lease.state != "ready")
        return holding.keeper.lease_id not in [lease.lease_id for lease in places[:replicas]]
