"""What one run of an engine tells of its requests: counts, and a span for each from claim to end."""

from __future__ import annotations

import time
from collections import deque

from treadle.errors import Cancelled
from treadle.queue.log import Appended
from treadle.telemetry.tracing import SpanKind, Tracer
from treadle_worker.clock import RedisClock
from treadle_worker.engine_protocol import SequenceOutput, StepOutputs, TaskOutput
from treadle_worker.metrics import ModelMetrics
from treadle_worker.requests import RequestTable, RunningRequest
from treadle_worker.tasks import RunningTask


class Observation:
    """Told of what happens; counts and traces, and does nothing else."""

    def __init__(
        self,
        metrics: ModelMetrics,
        tracer: Tracer,
        clock: RedisClock,
        table: RequestTable,
        *,
        num_commands: int = 0,
    ) -> None:
        """`num_commands`: how many the engine has been given before the first that is told of here."""
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock
        self._table = table
        self._num_commands = num_commands
        self._freeing: deque[tuple[int, float]] = deque()
        """Of cancelled requests: the number of the command that frees the blocks, and when it was due."""

    def claimed(self, request: RunningRequest) -> None:
        """The request is this worker's from now on."""
        if not self._tracer.recording:
            return
        job = request.job
        request.span = self._tracer.span(
            f"{request.operation} {self._metrics.name}",
            traceparent=job.traceparent,
            kind=SpanKind.CONSUMER,
            attributes={
                "gen_ai.operation.name": request.operation,
                "gen_ai.provider.name": "treadle",
                "gen_ai.request.model": job.model_name or self._metrics.name,
                "gen_ai.response.id": job.request.request_id,
                "gen_ai.usage.input_tokens": request.num_input_tokens,
                "treadle.profile": job.profile,
                "treadle.epoch": request.epoch,
            },
        )
        if request.resumed:
            request.span.event("takeover", {"treadle.delivered_tokens": request.num_delivered})

    def commanded(self, cancelled_s: float | None = None) -> None:
        """A command was put for the engine; with the seconds since its cause, one that frees a cancelled
        request's blocks."""
        self._num_commands += 1
        if cancelled_s is not None:
            self._freeing.append((self._num_commands, time.monotonic() - cancelled_s))

    def stepped(self, step: StepOutputs) -> None:
        """The engine made a step."""
        self._metrics.step(step.stats)
        while self._freeing and self._freeing[0][0] <= step.stats.num_commands:
            self._metrics.cancel_to_free.observe(max(0.0, time.monotonic() - self._freeing.popleft()[1]))
        for engine_id in step.admitted:
            if (request := self._table.by_engine_id(engine_id)) is not None:
                self._admitted(request, step.scheduled_at)
        for engine_id in step.preempted:
            if (request := self._table.by_engine_id(engine_id)) is not None:
                request.span.event("preemption")

    def _admitted(self, request: RunningRequest, scheduled_at: float) -> None:
        ago_ms = (time.monotonic() - scheduled_at) * 1000
        waited_s = max(0.0, (self._clock.now_ms() - ago_ms - request.delivery.added_ms) / 1000)
        if not request.resumed:
            self._metrics.queue_time.observe(waited_s)
        if request.span.recording:
            request.span.event("scheduled", {"treadle.queue_time_s": waited_s})

    def said(self, request: RunningRequest, output: SequenceOutput) -> None:
        """The engine made tokens for a request, or ended it."""
        if request.span.recording and output.token_ids and output.first_index == request.num_delivered:
            request.span.event("first_token")

    def answered(self, request: RunningTask, output: TaskOutput) -> None:
        """The engine ended a task."""
        if not output.error:
            self._metrics.computed(request.name, len(request.job.inputs), request.num_input_tokens)

    def let_go(self, request: RunningRequest, outcome: Appended) -> None:
        """The request's end is written, or it is no longer this worker's."""
        if outcome is not Appended.WRITTEN:
            self._metrics.ended(outcome.name.lower())
        elif request.error is not None:
            self._metrics.ended("cancelled" if isinstance(request.error, Cancelled) else "failed")
        else:
            self._metrics.ended("finished")
        if request.span.recording:
            self._end_span(request, outcome.name.lower())

    def cancelled(self, request: RunningRequest) -> None:
        """Somebody else ended the request."""
        self._metrics.ended("cancelled")
        if request.span.recording:
            self._end_span(request, "cancelled")

    def handed_back(self, request: RunningRequest) -> None:
        """The request goes to whoever claims it next."""
        self._metrics.ended("handed_back")
        if request.span.recording:
            self._end_span(request, "handed_back")

    def _end_span(self, request: RunningRequest, outcome: str) -> None:
        request.span.set({**request.usage(), "treadle.outcome": outcome})
        request.span.end(request.error)
