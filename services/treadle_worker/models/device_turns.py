"""Engines of one worker that share a device take turns: at most one computes at a time.

So each kind gets its configured share of the time, whatever the system would have given it (decision 11).
While one engine alone has work it keeps the turn, and nothing is said or measured. Once another one wants
it, the turn is taken from its holder when its quantum is over, and goes to whoever is due.

Who is due is found in two levels of stride scheduling (Waldspurger and Weihl, 1995), by the time that was
really used: the kinds of engines (those that generate, and those of tasks) by their shares, then the engines
of a kind evenly. Who has nothing to do gives up its part and saves none: it comes back as if it had used as
much as the others.

Everything here acts on events, on the event loop, and waits for nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["generate", "task"]
Say = Callable[[bool], None]
"""Grants the turn to an engine (True), or takes it away: then it says TurnOver, after its step."""

QUANTUM_S = 0.05
"""How long an engine keeps the turn while another waits, but for the step that it is in, or until it has what
it is due; less in a kind with less than half."""
_SHORTEST_S = 0.001
"""Between two looks who is due."""
DEFAULT_TASK_SHARE = 0.5


class Clock(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float:
        """Seconds."""
        ...

    def call_at(self, when: float, callback: Callable[[], None], /) -> Any:
        """Calls back then, unless what is returned is cancelled."""
        ...


@dataclass(eq=False, slots=True)
class _Group:
    """The engines of one kind."""

    share: float
    passed: float = 0.0
    """Seconds that they used together, over their share."""
    floor: float = 0.0
    """What an engine that comes back is taken to have used at least: as much as whoever used least."""
    seats: list[Seat] = field(default_factory=list)

    def wanting(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.wants]


class Seat:
    """One engine's place at its device. It is told what the engine has to do, and what it says."""

    def __init__(self, device: DeviceTurns, kind: Kind, say: Say) -> None:
        self.kind: Kind = kind
        self.wants = False
        """Whether the engine has something to compute."""
        self.owes_from = math.inf
        """Since when the engine owes a sign of life: it has the turn and work, or is to give the turn back.
        Who waits for the turn, or for work, owes none."""
        self._device = device
        self._say = say
        self._passed = 0.0
        """Seconds that it used, as its group counts them."""
        self._num_taken = 0
        """How often the turn was taken away without an answer yet."""
        self._used_s = 0.0
        self._waited_s = 0.0

    @property
    def used_s(self) -> float:
        """How long it had the device while another one wanted it."""
        self._device.account()
        return self._used_s

    @property
    def waited_s(self) -> float:
        """How long it wanted the device while another one had it."""
        self._device.account()
        return self._waited_s

    def set_wants(self, wants: bool) -> None:
        """The engine has work from now on, or has none."""
        if wants != self.wants:
            self._device.set_wants(self, wants)

    def over(self) -> None:
        """The engine said TurnOver."""
        self._device.over(self)

    def leave(self) -> None:
        """The engine is gone, or is about to be; once is enough."""
        self._device.leave(self)


class DeviceTurns:
    """The engines of one device."""

    def __init__(self, shares: Mapping[Kind, float], clock: Clock, *, quantum_s: float = QUANTUM_S) -> None:
        self._groups: dict[Kind, _Group] = {kind: _Group(share) for kind, share in shares.items()}
        self._clock = clock
        self._quantum_s = quantum_s
        self._floor = 0.0
        """As a group's, of the groups."""
        self._granted_at = 0.0
        """When the holder's quantum began."""
        self._timer: Any = None
        self._is_taken = False
        """Whether the holder was told that its turn ends."""
        self._accounted_at = clock.time()
        self.holder: Seat | None = None
        """Whoever may compute; nobody else does."""
        self.num_handovers = 0

    @property
    def seats(self) -> list[Seat]:
        """Of all engines."""
        return [seat for group in self._groups.values() for seat in group.seats]

    def join(self, kind: Kind, say: Say) -> Seat:
        """A seat for an engine that is ready and idle. It begins with the turn, and is told at once if
        another one has it."""
        self.account()
        seat = Seat(self, kind, say)
        if self.holder is None:
            self._give(seat, silently=True)
        else:
            seat._num_taken += 1
            say(False)
        self._groups[kind].seats.append(seat)
        return seat

    def set_wants(self, seat: Seat, wants: bool) -> None:
        """See `Seat.set_wants`."""
        self.account()
        if wants:
            group = self._groups[seat.kind]
            if not group.wanting():
                group.passed = max(group.passed, self._floor)
            seat._passed = max(seat._passed, group.floor)
        seat.wants = wants
        if seat is self.holder and not self._is_taken:
            seat.owes_from = self._clock.time() if wants else math.inf
        self._decide()

    def over(self, seat: Seat) -> None:
        """See `Seat.over`."""
        seat._num_taken = max(0, seat._num_taken - 1)
        if seat is self.holder and self._is_taken and not seat._num_taken:
            self.account()
            self._pass_on()

    def leave(self, seat: Seat) -> None:
        """See `Seat.leave`."""
        group = self._groups[seat.kind]
        if seat not in group.seats:
            return
        self.account()
        group.seats.remove(seat)
        seat.wants = False
        if seat is self.holder:
            self._pass_on()
        else:
            self._decide()

    def _decide(self) -> None:
        """Whether the holder's turn ends, now or later."""
        if self._is_taken:
            return
        holder = self.holder
        if holder is None:
            self._pass_on()
        elif not any(seat.wants for seat in self.seats if seat is not holder):
            self._stop_timer()
        elif not holder.wants:
            self._take()
        elif self._timer is None:
            self._look_at(self._granted_at + self._quantum_of(holder))

    def _quantum_over(self) -> None:
        self._timer = None
        self.account()
        holder = self.holder
        if holder is None or self._is_taken:
            return
        if self._due() is holder:
            left_s = max(_SHORTEST_S, min(self._quantum_of(holder), self._until_due(holder)))
            self._look_at(self._clock.time() + left_s)
        else:
            self._take()

    def _quantum_of(self, holder: Seat) -> float:
        """Shorter for a kind with less than half: the other kind's turns grow with it, by their share."""
        return self._quantum_s * min(1.0, 2 * self._groups[holder.kind].share)

    def _look_at(self, when: float) -> None:
        self._timer = self._clock.call_at(when, self._quantum_over)

    def _until_due(self, holder: Seat) -> float:
        """How long the holder is still due before another one that waits, in seconds."""
        mine = self._groups[holder.kind]
        groups = [group for group in self._groups.values() if group is not mine and group.wanting()]
        others = [(group.passed - mine.passed) * mine.share for group in groups]
        others += [seat._passed - holder._passed for seat in mine.wanting() if seat is not holder]
        return min(others)

    def _take(self) -> None:
        """Tells the holder that its turn ends with its step."""
        assert self.holder is not None, "somebody has the turn"
        self._stop_timer()
        self._is_taken = True
        self.holder.owes_from = self._clock.time()
        self.holder._num_taken += 1
        self.holder._say(False)

    def _pass_on(self) -> None:
        """The turn is nobody's: gives it to whoever is due, or else to whoever is here."""
        self._stop_timer()
        seat = self._due() or next(iter(self.seats), None)
        if self.holder is not None:
            self.holder.owes_from = math.inf
        self.holder, self._is_taken = None, False
        if seat is not None:
            self._give(seat)
            self._decide()

    def _give(self, seat: Seat, *, silently: bool = False) -> None:
        self.holder = seat
        self._granted_at = self._clock.time()
        seat.owes_from = self._granted_at if seat.wants else math.inf
        if not silently:
            self.num_handovers += 1
            seat._say(True)

    def _due(self) -> Seat | None:
        """The engine that wants the turn and has used least of its part, in the kind that has."""
        groups = [group for group in self._groups.values() if group.wanting()]
        if not groups:
            return None
        # Of two that are even the holder comes second.
        group = min(groups, key=lambda one: (one.passed, self.holder in one.seats))
        return min(group.wanting(), key=lambda seat: (seat._passed, seat is self.holder))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def account(self) -> None:
        """Charges the holder for what it used since the last time, and counts who waited."""
        now = self._clock.time()
        took_s, self._accounted_at = now - self._accounted_at, now
        holder = self.holder
        if holder is None or took_s <= 0:
            return
        waiting = [seat for seat in self.seats if seat.wants and seat is not holder]
        for seat in waiting:
            seat._waited_s += took_s
        if not holder.wants:
            return
        holder._used_s += took_s if waiting else 0.0
        holder._passed += took_s
        self._groups[holder.kind].passed += took_s / self._groups[holder.kind].share
        groups = [group for group in self._groups.values() if group.wanting()]
        self._floor = max(self._floor, min(group.passed for group in groups))
        for group in groups:
            group.floor = max(group.floor, min(seat._passed for seat in group.wanting()))
