"""A claim that this worker answers for: its artifact, its lease, and the host that serves it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from treadle.errors import FailedPrecondition, TreadleError
from treadle_worker.config import EngineConfig
from treadle_worker.jobs import Artifact
from treadle_worker.models.configuration import complete, configured
from treadle_worker.models.leases import LeaseKeeper, Served
from treadle_worker.models.model_host import ModelHost
from treadle_worker.models.registry import Registry
from treadle_worker.models.wanted import Claim

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0


class Holding:
    """`run` is a task; `close` gives the lease back."""

    def __init__(
        self,
        claim: Claim,
        engine_config: EngineConfig,
        registry: Registry,
        holder: str,
        *,
        artifact: Artifact | None,
        time_to_live_s: float,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when the artifact is known, and when the lease is granted or refused."""
        self.claim = claim
        self.wanted = True
        """False once the model is only finished with."""
        self.replicas = 0
        """Workers wanted, when that was looked at last."""
        self.surplus = False
        """Fewer are wanted now, and this one is not among them."""
        self.artifact = artifact
        """Once the registry has answered."""
        self.host: ModelHost | None = None
        self.failure: TreadleError | None = None
        """Why this worker has no host for it."""
        try:
            self.config = configured(engine_config, claim.configuration)
        except FailedPrecondition as error:
            self.config, self.failure = engine_config, error
        self.unservable = self.failure is not None
        """No worker with these settings will ever serve it."""
        self._registry = registry
        self._changed = changed
        self.keeper = LeaseKeeper(
            registry, self.served, holder, time_to_live_s=time_to_live_s, answered=changed
        )

    @property
    def state(self) -> str:
        """As a host's; "failed" where there can be none."""
        if self.failure is not None:
            return "failed"
        return "loading" if self.host is None else self.host.state

    @property
    def is_ready(self) -> bool:
        """Whether requests may be sent here: an engine is ready, and a heartbeat has said so."""
        return self.host is not None and self.host.state == "ready" and self.host.is_announced

    def served(self) -> Served:
        """What the lease is to say."""
        # An alias moves to what is ready: by then every gateway must find it in the heartbeats.
        state = "loading" if self.state == "ready" and not self.is_ready else self.state
        failure = self.failure if self.host is None else self.host.failure
        return Served(
            self.claim.artifact_digest,
            complete(self.config),
            self.claim.alias,
            state,
            failure if state == "failed" else None,
        )

    async def run(self) -> None:
        """Finds the artifact and keeps the lease, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.keeper.run(), name="lease")
            group.create_task(self._find(), name="artifact")

    async def _find(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while self.artifact is None:
            try:
                self.artifact = await self._registry.resolve(self.claim.artifact_digest)
                self._changed()
                return
            except TreadleError as error:
                logger.warning(
                    "the artifact is not known yet", extra={"model": self.claim.name, "reason": error.reason}
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
