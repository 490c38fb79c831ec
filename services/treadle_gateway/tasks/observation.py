"""What a gateway tells of one task."""

from __future__ import annotations

import time

from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle_gateway.hold import prompt_tokens
from treadle_gateway.metrics import GatewayMetrics
from treadle_gateway.observation import Observation
from treadle_gateway.tasks.task import EmbedTask, Task


class TaskObservation(Observation):
    """Of a task, whose answer comes whole."""

    def __init__(self, metrics: GatewayMetrics, task: Task, request_id: str) -> None:
        # OpenTelemetry has a name for one of them.
        operation = "embeddings" if isinstance(task, EmbedTask) else task.name
        super().__init__(metrics, operation, task.context.model, request_id)
        self._task = task.name
        self._answer_tokens: int | None = None

    def _taken_in(self, entry: LaneEntry) -> None:
        labels = self._model, self._task
        self._metrics.task_inputs.labels(*labels).inc(len(entry.task.inputs))
        self._metrics.task_prompt_tokens.labels(*labels).inc(prompt_tokens(entry))

    def answered(self, prompt_tokens: int) -> None:
        """The answer is there for the client."""
        self._answer_tokens = prompt_tokens

    def _answered(self) -> bool:
        prompt_tokens = self._answer_tokens
        if prompt_tokens is None:
            return False
        if not self._joined:
            labels = self._model, self._task
            self._metrics.task_requests.labels(*labels).inc()
            self._metrics.task_latency.labels(*labels).observe(time.monotonic() - self._arrived)
        if self.span.recording:
            self.span.set({"gen_ai.usage.input_tokens": prompt_tokens})
        return True
