"""Tells the registry what this worker does with an artifact, for as long as it does it.

The registry may be away: then nothing is told, and nothing stops. A lease that lapsed meanwhile is acquired
again.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from treadle.deployments import ServingConfiguration
from treadle.errors import FailedPrecondition, NotFound, ResourceExhausted, TreadleError

logger = logging.getLogger(__name__)

RENEWALS = 3
"""How often a lease is renewed in its time to live."""
_FIRST_PAUSE_S = 0.25
_RELEASE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """What a lease says."""

    artifact_digest: str
    configuration: ServingConfiguration
    """Complete."""
    alias: str
    state: str
    """ "loading", "ready", "draining" or "failed"."""
    error: TreadleError | None = None


@dataclass(frozen=True, slots=True)
class KnownLease:
    """A worker's lease as the registry lists it."""

    lease_id: str
    alias: str
    configuration: ServingConfiguration
    state: str


class Leases(Protocol):
    """The registry's leases. Every call raises TreadleError."""

    async def acquire_lease(
        self, request_id: str, served: Served, *, holder: str, time_to_live_s: float
    ) -> str:
        """The lease's id; raises ResourceExhausted where there are as many as wanted, and FailedPrecondition
        where it is not wanted."""

    async def renew_lease(self, lease_id: str, served: Served, *, time_to_live_s: float) -> None:
        """Raises NotFound where it has lapsed."""

    async def release_lease(self, lease_id: str) -> None:
        """It is no longer needed."""

    async def leases(self, artifact_digest: str) -> list[KnownLease]:
        """The workers' leases of an artifact, the oldest first."""


class LeaseKeeper:
    """One lease; `run` is a task."""

    def __init__(
        self,
        leases: Leases,
        served: Callable[[], Served],
        holder: str,
        *,
        time_to_live_s: float,
        answered: Callable[[], None],
    ) -> None:
        """`served` gives what there is to say now; `answered` is told when the registry grants or refuses."""
        self._leases = leases
        self._served = served
        self._holder = holder
        self._time_to_live_s = time_to_live_s
        self._answered = answered
        self._woken = asyncio.Event()
        self._request_id = uuid.uuid4().hex
        self._told: Served | None = None
        self._said = ""
        """The reason that was logged last."""
        self.lease_id = ""
        """Empty while there is none."""
        self.refusal: TreadleError | None = None
        """Why the registry grants none, until it does."""

    def wake(self) -> None:
        """There may be something else to say."""
        if self._served() != self._told:
            self._woken.set()

    async def run(self) -> None:
        """Holds the lease for ever."""
        renew_s = self._time_to_live_s / RENEWALS
        pause_s = _FIRST_PAUSE_S
        while True:
            self._woken.clear()
            try:
                await self.tell()
                wait_s, pause_s, self._said = renew_s, _FIRST_PAUSE_S, ""
            except TreadleError as error:
                self._say(error)
                wait_s, pause_s = pause_s, min(2 * pause_s, renew_s)
            try:
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
            except TimeoutError:
                continue

    def _say(self, error: TreadleError) -> None:
        if error.reason != self._said:
            logger.warning(
                "the registry is not told what is served here",
                extra={"artifact": self._served().artifact_digest, "reason": error.reason},
            )
        self._said = error.reason

    async def tell(self) -> bool:
        """Acquires or renews; whether the lease is held now.

        Raises TreadleError where the registry did not answer: then the lease is what it was.
        """
        served = self._served()
        try:
            if self.lease_id:
                try:
                    await self._leases.renew_lease(self.lease_id, served, time_to_live_s=self._time_to_live_s)
                    self._told = served
                    return True
                except NotFound:
                    logger.info("a lease has lapsed", extra={"alias": served.alias, "lease": self.lease_id})
                    self._forget()
            self.lease_id = await self._leases.acquire_lease(
                self._request_id, served, holder=self._holder, time_to_live_s=self._time_to_live_s
            )
        except (ResourceExhausted, FailedPrecondition, NotFound) as error:
            self._forget()
            self._told = served
            if self.refusal is None:
                self.refusal = error
                self._answered()
            return False
        self._told, self.refusal = served, None
        self._answered()
        return True

    def _forget(self) -> None:
        # The same id would ask for the lease that is gone.
        self.lease_id, self._request_id = "", uuid.uuid4().hex

    async def release(self) -> None:
        """Gives the lease back, if the registry is there; else it lapses."""
        lease_id = self.lease_id
        self._forget()
        if not lease_id:
            return
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                await self._leases.release_lease(lease_id)
        except (TreadleError, TimeoutError):
            logger.info("a lease could not be released, it lapses by itself", extra={"lease": lease_id})
