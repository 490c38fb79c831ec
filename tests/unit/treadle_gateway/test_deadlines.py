"""Deadlines: the earliest holds, and a cancellation is never lost in them."""

from __future__ import annotations

import asyncio

import pytest

from treadle.errors import DeadlineExceeded
from treadle_gateway.deadlines import Deadline


def test_the_earliest_holds():
    assert 4 < Deadline.earliest(None, 5.0, 60.0).remaining_s <= 5
    assert Deadline.earliest(-1.0, None).passed
    with pytest.raises(DeadlineExceeded):
        Deadline(0.0001).remaining_ms()


async def test_work_is_cut_at_the_deadline():
    with pytest.raises(DeadlineExceeded):
        await Deadline(0.01).bound(asyncio.sleep(60))
    assert await Deadline(5).bound(asyncio.sleep(0, "done")) == "done"


async def test_a_timeout_of_the_works_own_passes():
    async def work() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await Deadline(5).bound(work())


async def test_a_cancellation_that_the_work_swallows_is_not_lost():
    async def swallow() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "went on"
        return "was not cancelled"

    task = asyncio.create_task(Deadline(60).bound(swallow()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
