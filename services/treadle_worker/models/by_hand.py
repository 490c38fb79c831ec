"""Models that an operator loads and unloads through the control port."""

from __future__ import annotations

import asyncio

from treadle.errors import FailedPrecondition, NotFound, Unavailable
from treadle_worker.models.holding import Holding
from treadle_worker.models.served_models import ServedModels

_LOOK_EVERY_S = 0.1


class ByHand:
    """Pins models on top of what settings and deployments want; a worker that starts anew has none."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    async def load(self, name: str) -> Holding:
        """Serves an alias or digest from now on; returns when it is ready.

        Raises what the registry says of the name; why it cannot be loaded, and then it is not tried again;
        and Unavailable (DRAINING). Where the caller does not wait, it is loaded all the same.
        """
        await self._models.pin(name)
        while True:
            if self._models.draining:
                raise Unavailable("the worker is leaving; load it on another one", reason="DRAINING")
            found = [holding for holding in self._models.holdings if holding.claim.name == name]
            for holding in found:
                if holding.is_ready:
                    return holding
            if found and all(holding.state == "failed" for holding in found):
                error = found[0].served().error
                self._models.unpin(name)
                assert error is not None, "what has failed says why"
                raise type(error)(error.message, reason=error.reason, metadata=error.metadata)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def unload(self, profile: str) -> None:
        """Lets go of what `load` has loaded; returns when it is gone, what ran is finished.

        Raises NotFound (PROFILE_NOT_LOADED), and FailedPrecondition (MODEL_WANTED) where settings or a
        deployment want it.
        """
        found = [one for one in self._models.holdings if one.host is not None and one.host.profile == profile]
        if not found:
            raise NotFound(
                f"this worker has no profile {profile[:64]!r}; GetWorkerStatus lists those that it has",
                reason="PROFILE_NOT_LOADED",
            )
        names = {holding.claim.name for holding in found}
        others = names - self._models.pinned
        if others:
            raise FailedPrecondition(
                f"{', '.join(sorted(others))} should be served here by the worker's settings or by a "
                "deployment; change those",
                reason="MODEL_WANTED",
            )
        for name in names:
            self._models.unpin(name)
        while True:
            if all(host.profile != profile for host in self._models.hosts):
                return
            await asyncio.sleep(_LOOK_EVERY_S)
