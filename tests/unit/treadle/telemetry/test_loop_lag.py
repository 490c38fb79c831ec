"""A loop that is held up is seen to be late."""

from __future__ import annotations

import asyncio
import contextlib
import time

from prometheus_client import CollectorRegistry
from waiting import until

from treadle.telemetry import loop_lag
from treadle.telemetry.loop_lag import LoopLag

NAME = "treadle:event_loop_lag_seconds"


async def test_a_blocked_loop_is_measured(monkeypatch):
    monkeypatch.setattr(loop_lag, "EVERY_S", 0.05)
    registry = CollectorRegistry()

    def looks() -> float:
        return registry.get_sample_value(f"{NAME}_count") or 0.0

    task = asyncio.create_task(LoopLag(registry).run())
    await until(lambda: looks() >= 5, "it looks")
    before_s = registry.get_sample_value(f"{NAME}_sum") or 0.0
    blocked_from = looks()
    time.sleep(0.6)  # noqa: ASYNC251 - this is what is to be seen
    await until(lambda: looks() > blocked_from, "it looks again", every_s=0)
    after_s = registry.get_sample_value(f"{NAME}_sum") or 0.0
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert after_s - before_s >= 0.5
    assert registry.get_sample_value(f"{NAME}_bucket", {"le": "0.5"}) < looks()
    print(
        f"{looks():.0f} looks, {before_s:.4f} s late before, {after_s:.3f} s after the loop stood for 0.6 s"
    )
