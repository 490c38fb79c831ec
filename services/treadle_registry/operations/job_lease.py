"""The lease of a job on the artifact that it reads, for as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from treadle.errors import TreadleError
from treadle_registry.registry import Registry
from treadle_registry.rollout.leasing import LeaseRequest

logger = logging.getLogger(__name__)

_LASTS_S = 60.0
_RENEW_S = 20.0


@contextlib.asynccontextmanager
async def leased(registry: Registry, digest: str, holder: str) -> AsyncIterator[None]:
    """Keeps an artifact from being deleted and evicted until the block ends; raises as `acquire` does."""
    request = LeaseRequest(digest, holder, time_to_live_s=_LASTS_S)
    lease_id = (await registry.in_thread(registry.leasing.acquire, request)).lease_id
    renewing = asyncio.create_task(_renew(registry, lease_id), name=f"lease of {holder}")
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        registry.uses.touch(digest)
        try:
            await registry.in_thread(registry.leasing.release, lease_id)
        except TreadleError as error:
            logger.warning("a job's lease lapses by itself", extra={"reason": error.reason})


async def _renew(registry: Registry, lease_id: str) -> None:
    while True:
        await asyncio.sleep(_RENEW_S)
        try:
            await registry.in_thread(registry.leasing.renew, lease_id, None, None)
        except TreadleError as error:
            # Should the artifact go then, the job says so.
            logger.warning("a job's lease is not renewed", extra={"reason": error.reason})
