"""The time that a request may take, on this process's monotonic clock."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from treadle.errors import DeadlineExceeded
from treadle_gateway.config import GatewayConfig

T = TypeVar("T")


class Deadline:
    """A moment after which nobody waits for the answer any more."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @classmethod
    def earliest(cls, *seconds: float | None) -> Deadline:
        """The earliest of those that are set; at least one is."""
        return cls(min(value for value in seconds if value is not None))

    @property
    def remaining_s(self) -> float:
        """Seconds left; negative when it has passed."""
        return self._at - time.monotonic()

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self.remaining_s <= 0

    def remaining_ms(self) -> int:
        """Whole milliseconds left, at least one; raises DeadlineExceeded when there are none."""
        milliseconds = int(self.remaining_s * 1000)
        if milliseconds < 1:
            raise out_of_time()
        return milliseconds

    @contextlib.contextmanager
    def tells(self, out: Callable[[], None]) -> Iterator[None]:
        """Calls `out` when the time is up, if that is before the block's end."""
        timer = asyncio.get_running_loop().call_later(self.remaining_s, out)
        try:
            yield
        finally:
            timer.cancel()

    async def bound(self, work: Awaitable[T]) -> T:
        """Awaits `work`; raises DeadlineExceeded, and cancels it, when the time is up before."""
        task = asyncio.current_task()
        assert task is not None, "only a task can be cancelled when the time is up"
        cancelling = task.cancelling()
        try:
            async with asyncio.timeout(self.remaining_s) as scope:
                result = await work
            # Before Python 3.12 asyncio.wait_for, which libraries use, swallows a cancellation that comes as
            # its work completes: a client that left would be waited for until its deadline.
            if task.cancelling() > cancelling:
                raise asyncio.CancelledError
            return result
        except TimeoutError as error:
            if scope.expired():
                raise out_of_time() from error
            raise


def request_deadline(timeout_s: float | None, remaining_s: float | None, limits: GatewayConfig) -> Deadline:
    """A new request's: the earliest of its timeout, its call's own deadline and the gateway's limit."""
    unset = timeout_s is None and remaining_s is None
    longest_s = limits.default_timeout_s if unset else limits.max_timeout_s
    return Deadline.earliest(timeout_s, remaining_s, longest_s)


def out_of_time() -> DeadlineExceeded:
    """What a request is told whose time is up."""
    return DeadlineExceeded(
        "the request's time is up; allow a longer timeout or gRPC deadline, or ask for fewer tokens"
    )
