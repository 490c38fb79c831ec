"""When a lost call is tried again, and when it is given up."""

from __future__ import annotations

import asyncio
import time

import grpc

from treadle.errors import DeadlineExceeded, TreadleError
from treadle.rpc import from_rpc_error
from treadle.rpc.status import is_loss

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


class Reconnects:
    """Counts the tries of one call since its last progress, within the call's deadline."""

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._limit = limit
        self._deadline = time.monotonic() + timeout_s
        self._failed = 0
        self.total = 0
        """How often the call was tried again so far."""

    def left_s(self) -> float:
        """Seconds until the deadline; raises DeadlineExceeded when there are none."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's time was up before its answer was complete")
        return left

    def progress(self) -> None:
        """Something arrived: the next loss starts counting anew."""
        self._failed = 0

    async def pause(self, error: grpc.aio.AioRpcError) -> None:
        """Waits before the next try; raises the TreadleError that `error` means when there is none."""
        failure = from_rpc_error(error)
        if not is_loss(error):
            raise failure from error
        await self.pause_after(failure)

    async def pause_after(self, failure: TreadleError) -> None:
        """Waits before the next try after a loss; raises `failure` when there is none."""
        pause = self._pause_s(failure)
        if self._failed >= self._limit or pause >= self._deadline - time.monotonic():
            raise failure
        self._failed += 1
        self.total += 1
        await asyncio.sleep(pause)

    def _pause_s(self, failure: TreadleError) -> float:
        pause = min(_FIRST_PAUSE_S * 2.0**self._failed, _LONGEST_PAUSE_S)
        return max(pause, min(failure.retry_after_s or 0.0, _LONGEST_PAUSE_S))
