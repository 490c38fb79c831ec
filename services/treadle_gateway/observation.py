"""What a gateway tells of one request: counts, and a span from its arrival to its end."""

from __future__ import annotations

import time

from treadle.api.inference.v1.generation_pb2 import FINISH_REASON_LENGTH, Finished, TokenDelta
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.errors import TreadleError
from treadle.telemetry.tracing import NO_SPAN, Span, current_span
from treadle_gateway.generation import ChatPrompt, Generation
from treadle_gateway.metrics import GatewayMetrics
from treadle_gateway.token_stream import Chunk


class Observation:
    """Told of what happens to a request; counts and traces, and does nothing else."""

    def __init__(self, metrics: GatewayMetrics, operation: str, model: str, request_id: str) -> None:
        """`operation` is what is asked of the model, in OpenTelemetry's words."""
        self._metrics = metrics
        self._operation = operation
        self._asked_model = model
        self._request_id = request_id
        self._arrived = time.monotonic()
        self._model = ""
        """The model's name, once it is known that there is one."""
        self._joined = False
        self.span: Span = NO_SPAN
        """Of this request; the call's own may hold many, in a batch."""

    def begin(self) -> None:
        """Work on the request starts, in the task that does it."""
        parent = current_span()
        if not parent.recording:
            return
        self.span = parent.child(
            f"{self._operation} {self._asked_model}",
            attributes={
                "gen_ai.operation.name": self._operation,
                "gen_ai.provider.name": "treadle",
                "gen_ai.request.model": self._asked_model,
                "gen_ai.response.id": self._request_id,
            },
        )

    def prepared(self, entry: LaneEntry | None) -> None:
        """The request can be queued; None: it was queued before, and only its answer is wanted."""
        # Its model is known: nothing gets this far without.
        self._model = self._asked_model
        if entry is None:
            self._joined = True
            self._metrics.resumes.inc()
            self.span.event("joined")
            return
        self._taken_in(entry)
        self.span.event("queued")

    def end(self, error: TreadleError) -> None:
        """Nobody waits any more; `error` is why, unless the answer is complete."""
        if self._answered():
            self.span.end()
        else:
            self._metrics.failure.labels(self._model, error.reason).inc()
            self.span.end(error)

    def _taken_in(self, entry: LaneEntry) -> None:
        """Counts what is queued."""

    def _answered(self) -> bool:
        """Counts a complete answer; False where there is none."""
        raise NotImplementedError


class GenerationObservation(Observation):
    """Of a generation, whose answer comes in pieces."""

    def __init__(self, metrics: GatewayMetrics, generation: Generation, request_id: str) -> None:
        operation = "chat" if isinstance(generation.prompt, ChatPrompt) else "text_completion"
        super().__init__(metrics, operation, generation.model, request_id)
        self._last = 0.0
        """When the last token came; 0: none has."""
        self._finished: Finished | None = None

    def _taken_in(self, entry: LaneEntry) -> None:
        self._metrics.prompt_tokens.labels(self._model).observe(len(entry.prompt_token_ids))

    def chunk(self, chunk: Chunk) -> None:
        """A piece of the answer is there for the client."""
        if isinstance(chunk.body, Finished):
            self._finished = chunk.body
        elif isinstance(chunk.body, TokenDelta) and not self._joined:
            now = time.monotonic()
            if self._last:
                self._metrics.between_tokens.labels(self._model).observe(now - self._last)
            else:
                self._metrics.first_token.labels(self._model).observe(now - self._arrived)
                self.span.event("first_token")
            self._last = now

    def _answered(self) -> bool:
        finished = self._finished
        if finished is None:
            return False
        ended_by = {choice.finish_reason for choice in finished.choices}
        reasons = {"length" if reason == FINISH_REASON_LENGTH else "stop" for reason in ended_by}
        if not self._joined:
            # Who joins a run sees an answer that was counted for whoever began it.
            for reason in reasons:
                self._metrics.success.labels(self._model, reason).inc()
            self._metrics.whole.labels(self._model).observe(time.monotonic() - self._arrived)
            self._metrics.generation_tokens.labels(self._model).observe(finished.usage.output_tokens)
        if self.span.recording:
            self.span.set(
                {
                    "gen_ai.usage.input_tokens": finished.usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": finished.usage.output_tokens,
                    "gen_ai.response.finish_reasons": sorted(reasons),
                }
            )
        return True
