"""When a transfer that broke off is taken up again, and when it is given up."""

from __future__ import annotations

import asyncio

import grpc

from treadle.errors import TreadleError
from treadle.rpc import from_rpc_error
from treadle.rpc.status import is_loss

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


class Retries:
    """Counts failures since the last byte that got through; a transfer has no deadline, only patience."""

    def __init__(self, limit: int = 12) -> None:
        self._limit = limit
        self._failed = 0
        self.total = 0
        """How often it was taken up again so far."""

    def progress(self) -> None:
        """Something got through: the next failure starts counting anew."""
        self._failed = 0

    async def pause(self, error: grpc.aio.AioRpcError | TreadleError) -> None:
        """Waits before the next try, or raises the TreadleError that `error` means where there is none."""
        failure = from_rpc_error(error) if isinstance(error, grpc.aio.AioRpcError) else error
        if not _may_pass(error, failure) or self._failed >= self._limit:
            raise failure from error
        pause_s = min(_FIRST_PAUSE_S * 2.0**self._failed, _LONGEST_PAUSE_S)
        self._failed += 1
        self.total += 1
        await asyncio.sleep(max(pause_s, min(failure.retry_after_s or 0.0, _LONGEST_PAUSE_S)))


def _may_pass(error: grpc.aio.AioRpcError | TreadleError, failure: TreadleError) -> bool:
    """Whether trying again may help."""
    if failure.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED") or failure.retry_after_s is not None:
        return True
    return isinstance(error, grpc.aio.AioRpcError) and is_loss(error)
