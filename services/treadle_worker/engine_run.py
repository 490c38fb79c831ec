"""One life of one engine: from Ready to its end, with the tasks that feed it and write what it makes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from redis.asyncio import Redis

from treadle.errors import TreadleError, Unavailable
from treadle.queue import keys, lanes
from treadle.queue.log import Appended
from treadle.telemetry.tracing import Tracer
from treadle.text.tokenizer import Tokenizer
from treadle_worker.claims import Claimer, too_late
from treadle_worker.clock import RedisClock
from treadle_worker.engine_protocol import (
    AbortRequest,
    EngineCommand,
    EngineEvent,
    EngineStats,
    Failed,
    Ready,
    StepOutputs,
)
from treadle_worker.generations import RunningGeneration
from treadle_worker.intake import Capacity, Intake
from treadle_worker.lapses import Lapses
from treadle_worker.metrics import ModelMetrics
from treadle_worker.models.device_turns import Seat
from treadle_worker.models.turns import Turns
from treadle_worker.observation import Observation
from treadle_worker.pace import Pace
from treadle_worker.requests import RequestTable, RunningRequest
from treadle_worker.streams import StreamWriter
from treadle_worker.tasks import RunningTask

logger = logging.getLogger(__name__)

STALLED_S = 30.0
"""An engine that holds requests and says nothing for so long is dead to us; a step takes far less."""


class Engine(Protocol):
    """What the I/O process needs of an engine: `EngineClient`, or a stand-in in tests."""

    @property
    def process_id(self) -> int:
        """Of its process."""
        ...

    async def send(self, commands: Sequence[EngineCommand]) -> None:
        """Raises Unavailable when it is gone."""
        ...

    def events(self) -> AsyncIterator[EngineEvent]:
        """What it says; ends with it."""
        ...

    async def stop(self) -> int:
        """Ends it, and waits for its end."""
        ...


@dataclass(frozen=True, slots=True)
class Links:
    """What every run of the worker's engines shares."""

    redis: Redis
    blocking: Redis
    """A client of this model's own, for reads that block."""
    consumer: str
    clock: RedisClock
    max_claimed: int
    max_claimed_tokens: int
    lease_ms: int
    gather_s: float
    """The longest that tokens of an answer that flows are gathered."""
    tracer: Tracer = field(default_factory=Tracer)
    turns: Turns = field(default_factory=Turns)
    """At the devices that the worker's engines share."""


class EngineRun:
    """Claims for a ready engine, feeds it, and writes its outputs until it ends.

    Reading the engine never waits for Redis, and never for the engine to take commands: outputs go into the
    requests at once, and tasks of their own write and send.
    """

    def __init__(
        self,
        engine: Engine,
        ready: Ready,
        profile: str,
        tokenizer: Tokenizer,
        links: Links,
        metrics: ModelMetrics,
        *,
        seat: Seat,
        num_commands: int = 0,
    ) -> None:
        """`seat`: the engine's at its device; `num_commands`: how many the engine has been given already."""
        self._engine = engine
        self.seat = seat
        self._metrics = metrics
        self._ready = ready
        self._links = links
        self.table = RequestTable()
        self._observation = Observation(
            metrics, links.tracer, links.clock, self.table, num_commands=num_commands
        )
        self.stats = EngineStats(
            num_blocks=ready.num_blocks,
            num_free_blocks=ready.num_blocks,
            device_memory=ready.device_memory,
        )
        self.writer = StreamWriter(links.redis, self._let_go, Pace(links.gather_s))
        self._commands: list[EngineCommand] = []
        self._commanded = asyncio.Event()
        self._heard_at = asyncio.get_running_loop().time()
        self._empty = asyncio.Event()
        self._empty.set()
        self.claimer = Claimer(
            links.redis,
            links.consumer,
            self.table,
            links.clock,
            tokenizer,
            start=self._start,
            expire=lambda request: self.end(request, too_late()),
        )
        self.intake = Intake(
            links.redis,
            links.blocking,
            profile=profile,
            consumer=links.consumer,
            table=self.table,
            capacity=Capacity(
                self.table,
                ready,
                max_claimed=links.max_claimed,
                max_claimed_tokens=links.max_claimed_tokens,
            ),
            claimer=self.claimer,
            metrics=metrics,
            clock=links.clock,
            lease_ms=links.lease_ms,
        )
        look_s = links.lease_ms / 1000 / keys.RENEWALS
        self._lapses = Lapses(links.redis, self.table, self.end, look_s=look_s)
        self._intake_task: asyncio.Task[None] | None = None

    async def run(self, events: AsyncIterator[EngineEvent], *, claims: bool) -> None:
        """Runs until the engine ends, and then raises Unavailable (ENGINE_DIED); hands back what is held."""
        ended: BaseException = Unavailable("the engine's channel ended", reason="ENGINE_DIED")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.writer.run(), name="writer")
                group.create_task(self._send(), name="commands")
                group.create_task(self._lapses.run(), name="lapses")
                group.create_task(self._watch(), name="watchdog")
                if claims:
                    self._intake_task = group.create_task(self.intake.run(), name="intake")
                await self._read(events)
        except* Unavailable as errors:
            ended = errors.exceptions[0]
        finally:
            # It is given the turn no more, however long Redis takes now.
            self.seat.set_wants(False)
            self._metrics.turns(self.seat.used_s, self.seat.waited_s)
            await self._hand_back()
        raise ended

    async def _read(self, events: AsyncIterator[EngineEvent]) -> None:
        message = "the engine said no more"
        async for event in events:
            self._heard_at = asyncio.get_running_loop().time()
            if isinstance(event, StepOutputs):
                self._take(event)
            elif isinstance(event, Failed):
                message = event.message
        raise Unavailable(message, reason="ENGINE_DIED")

    def _take(self, step: StepOutputs) -> None:
        self.stats = step.stats
        self._observation.stepped(step)
        for output in step.outputs:
            request = self.table.by_engine_id(output.request_id)
            if not isinstance(request, RunningGeneration):
                continue
            if request.span.recording:
                self._observation.said(request, output)
            if request.accept(output):
                self._command(AbortRequest(request_id=request.engine_id))
            self.writer.mark(request)
        for answer in step.task_outputs:
            task = self.table.by_engine_id(answer.request_id)
            if isinstance(task, RunningTask):
                self._observation.answered(task, answer)
                task.accept(answer)
                self.writer.mark(task)
        self.seat.set_wants(self._has_work())

    def _start(self, request: RunningRequest) -> None:
        self._empty.clear()
        self._observation.claimed(request)
        if not request.ended and (error := request.refusal(self._ready)) is not None:
            request.fail(error)
        if not request.ended and (command := request.start()) is not None:
            self._command(command)
            self.seat.set_wants(True)
        self.writer.mark(request)

    def end(self, request: RunningRequest, error: TreadleError) -> None:
        """Ends a request with an error, in the engine and in its log."""
        if not request.ended:
            request.fail(error)
            self._command(AbortRequest(request_id=request.engine_id), cancelled_s=0.0)
            self.seat.set_wants(self._has_work())
            self.writer.mark(request)

    def cancelled(self, request: RunningRequest, ago_s: float) -> None:
        """Somebody fenced the request and wrote its end `ago_s` ago: only its lane's entry is left."""
        self._observation.cancelled(request)
        self._drop(request, cancelled_s=ago_s)
        self.writer.finish(request)

    def watch(self, request: RunningRequest, gateway_id: str) -> None:
        """A gateway wants to be told of news, and of what was written before it asked."""
        request.watchers.add(gateway_id)
        self.writer.announce(request)

    def _let_go(self, request: RunningRequest, outcome: Appended) -> None:
        self._observation.let_go(request, outcome)
        self._drop(request, cancelled_s=0.0 if outcome is Appended.CANCELLED else None)
        if outcome is Appended.VANISHED:
            self.writer.finish(request)
        if outcome is not Appended.WRITTEN:
            logger.info(
                "a request is no longer this worker's",
                extra={"request_id": request.keys.request_id, "outcome": outcome.name},
            )

    def _drop(self, request: RunningRequest, cancelled_s: float | None = None) -> None:
        self.table.remove(request)
        self._command(AbortRequest(request_id=request.engine_id), cancelled_s)
        self.seat.set_wants(self._has_work())
        self.intake.has_room()
        if not len(self.table):
            self._empty.set()

    def _command(self, command: EngineCommand, cancelled_s: float | None = None) -> None:
        """Puts a command for the engine; `cancelled_s`: how long ago its request was cancelled."""
        self._observation.commanded(cancelled_s)
        self._commands.append(command)
        self._commanded.set()

    async def _send(self) -> None:
        while True:
            await self._commanded.wait()
            self._commanded.clear()
            commands, self._commands = self._commands, []
            await self._engine.send(commands)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1)
            self._metrics.turns(self.seat.used_s, self.seat.waited_s)
            if loop.time() - max(self._heard_at, self.seat.owes_from) > STALLED_S:
                raise Unavailable(f"the engine made no step for {STALLED_S:.0f} s", reason="ENGINE_STALLED")

    def _has_work(self) -> bool:
        """Whether the engine has anything to compute."""
        return any(not request.ended for request in self.table)

    async def drain(self, timeout_s: float) -> None:
        """Claims no more; returns when all is finished and written, or the time is up."""
        self.intake.pause()
        try:
            async with asyncio.timeout(timeout_s):
                if self._intake_task is not None:
                    await asyncio.wait({self._intake_task})
                await self._empty.wait()
                await self.writer.flushed()
        except TimeoutError:
            logger.warning("the time to drain is up", extra={"requests_left": len(self.table)})

    async def _hand_back(self) -> None:
        """Makes what is held claimable by anybody, this worker too; else it waits for the lease's end."""
        held = [(one.keys, one.delivery.lane, one.delivery.entry_id) for one in self.table]
        for request in self.table:
            self._observation.handed_back(request)
            self.table.remove(request)
        if not held:
            return
        try:
            count = await lanes.hand_back(self._links.redis, self._links.consumer, held)
        except TreadleError as error:
            logger.warning("could not hand requests back", extra={"reason": error.reason, "count": len(held)})
        else:
            logger.info("handed requests back", extra={"count": count})
