"""Fake engines that take turns at a device, on a clock that only this moves: every step is an event."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from treadle_worker.models.device_turns import DeviceTurns, Kind, Seat


class _Handle:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeClock:
    """As an event loop's, without one."""

    def __init__(self) -> None:
        self.now = 100.0
        self._calls: list[tuple[float, int, _Handle]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> _Handle:
        handle = _Handle(callback)
        heapq.heappush(self._calls, (max(when, self.now), next(self._numbers), handle))
        return handle

    def run(self, seconds: float) -> None:
        """Lets so much time pass, and calls back what is due."""
        ends = self.now + seconds
        while self._calls and self._calls[0][0] <= ends:
            self.now, _, handle = heapq.heappop(self._calls)
            if handle.callback is not None:
                handle.callback()
        self.now = ends


@dataclass
class FakeEngine:
    """Makes steps of `step_s` while it has the turn and work; hears of either after `delay_s`."""

    table: TurnTable
    name: str
    kind: Kind
    step_s: float
    delay_s: float = 0.0
    seat: Seat = field(init=False)
    has_turn: bool = True
    has_work: bool = False
    busy_until: float | None = None
    dead: bool = False
    computed_s: float = 0.0
    num_steps: int = 0
    owes: int = 0

    def __post_init__(self) -> None:
        self.seat = self.table.device.join(self.kind, self._said)

    def work(self, wants: bool = True) -> None:
        """Gives it work without an end, or takes all away."""
        self.seat.set_wants(wants)
        self._later(lambda: self._set_work(wants))

    def die(self) -> None:
        """It says no more; whoever watches it lets its seat go."""
        self.dead = True
        if self.table.computing is self:
            self.table.computing = None
        self.seat.leave()

    def _said(self, granted: bool) -> None:
        self._later(lambda: self._hear(granted))

    def _later(self, hear: Callable[[], None]) -> None:
        """Everything that is said to it goes one way, and arrives in order."""
        self.table.clock.call_at(self.table.clock.now + self.delay_s, hear)

    def _set_work(self, wants: bool) -> None:
        self.has_work = wants
        self._go_on()

    def _hear(self, granted: bool) -> None:
        if self.dead:
            return
        self.has_turn = granted
        if not granted:
            self.owes += 1
        self._go_on()

    def _go_on(self) -> None:
        if self.dead or self.busy_until is not None:
            return
        while self.owes:
            self.owes -= 1
            self.seat.over()
        if self.has_turn and self.has_work:
            self.table.begins(self)
            self.busy_until = self.table.clock.now + self.step_s
            self.table.clock.call_at(self.busy_until, self._end_step)

    def _end_step(self) -> None:
        self.busy_until = None
        if self.dead:
            return
        self.computed_s += self.step_s
        self.num_steps += 1
        self.table.ends(self)
        self._go_on()


class TurnTable:
    """A device and its engines; fails as soon as two compute at once."""

    def __init__(self, task_share: float, quantum_s: float = 0.05) -> None:
        self.clock = FakeClock()
        shares: dict[Kind, float] = {"generate": 1 - task_share, "task": task_share}
        self.device = DeviceTurns(shares, self.clock, quantum_s=quantum_s)
        self.computing: FakeEngine | None = None
        self.num_messages = 0

    def engine(self, name: str, kind: Kind, step_s: float, delay_s: float = 0.0) -> FakeEngine:
        return FakeEngine(self, name, kind, step_s, delay_s)

    def begins(self, engine: FakeEngine) -> None:
        other = self.computing
        assert other is None, f"{engine.name} began while {other.name if other else ''} computed"
        self.computing = engine

    def ends(self, engine: FakeEngine) -> None:
        assert self.computing is engine
        self.computing = None
