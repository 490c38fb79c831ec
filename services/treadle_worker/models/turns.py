"""Turns at the devices of a worker: engines are told what `device_turns` decides, and it what they say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from treadle.errors import Unavailable
from treadle_worker.engine_protocol import EngineCommand, EngineEvent, Ready, Turn, TurnOver
from treadle_worker.models.device_turns import DEFAULT_TASK_SHARE, DeviceTurns, Kind, Seat


class Engine(Protocol):
    """What can be sent a command."""

    async def send(self, commands: Sequence[EngineCommand]) -> None:
        """Raises Unavailable when it is gone."""
        ...


class Turns:
    """The devices of one worker, by the name that engines are told."""

    def __init__(self, task_share: float = DEFAULT_TASK_SHARE) -> None:
        """`task_share`: of a device's time, what engines of tasks get while others generate there."""
        self._task_share = task_share
        self.devices: dict[str, DeviceTurns] = {}

    @contextlib.asynccontextmanager
    async def joined(self, device: str, engine: Engine, ready: Ready) -> AsyncGenerator[Seat, None]:
        """A seat at the device for an engine that has just become ready, until the block ends.

        An engine that is gone is told nothing more: that it ended is in its events.
        """
        turns = self.devices.get(device)
        if turns is None:
            shares: dict[Kind, float] = {"generate": 1 - self._task_share, "task": self._task_share}
            turns = self.devices[device] = DeviceTurns(shares, asyncio.get_running_loop())
        outbox: list[bool] = []
        said = asyncio.Event()

        def say(granted: bool) -> None:
            outbox.append(granted)
            said.set()

        async def flush() -> None:
            while outbox:
                commands: list[EngineCommand] = [Turn(granted=granted) for granted in outbox]
                outbox.clear()
                await engine.send(commands)

        async def send() -> None:
            with contextlib.suppress(Unavailable):
                while True:
                    await said.wait()
                    said.clear()
                    await flush()

        seat = turns.join("generate" if ready.generates else "task", say)
        sending: asyncio.Task[None] | None = None
        try:
            # It must know that it has not got the turn before it is given anything to compute.
            await flush()
            sending = asyncio.create_task(send(), name="turns")
            yield seat
        finally:
            seat.leave()
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)


async def telling(events: AsyncIterator[EngineEvent], seat: Seat) -> AsyncGenerator[EngineEvent, None]:
    """The engine's events but for TurnOver, which the seat is told."""
    async for event in events:
        if isinstance(event, TurnOver):
            seat.over()
        else:
            yield event
