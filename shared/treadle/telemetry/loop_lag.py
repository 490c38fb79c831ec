"""How late the event loop is: what every request of the process waits for beside its own work."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Histogram

EVERY_S = 0.25

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class LoopLag:
    """Sleeps, and measures by how much it is woken too late; `run` is a task."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "treadle:event_loop_lag_seconds",
            "By how much the event loop woke a sleeper too late, looked at four times a second.",
            buckets=_BUCKETS,
            registry=registry,
        )

    async def run(self) -> None:
        """Looks every EVERY_S, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self._seconds.observe(max(0.0, loop.time() - due))
