"""The tasks that the gateway takes, in plain Python."""

from __future__ import annotations

import uuid

from treadle.queue.keys import RequestKeys
from treadle_gateway.admission import Admission
from treadle_gateway.config import GatewayConfig
from treadle_gateway.deadlines import request_deadline
from treadle_gateway.hold import Queue
from treadle_gateway.metrics import GatewayMetrics
from treadle_gateway.tasks.observation import TaskObservation
from treadle_gateway.tasks.preparation import TaskPreparation
from treadle_gateway.tasks.run import TaskRun
from treadle_gateway.tasks.task import Task
from treadle_gateway.tasks.validation import validate


class Tasks:
    """Takes tasks; `remaining_s` is what the call's own deadline leaves, None: it has none."""

    def __init__(
        self,
        config: GatewayConfig,
        queue: Queue,
        preparation: TaskPreparation,
        admission: Admission,
        metrics: GatewayMetrics,
    ) -> None:
        self._config = config
        self._queue = queue
        self._preparation = preparation
        self._admission = admission
        self._metrics = metrics

    def run(self, task: Task, remaining_s: float | None) -> TaskRun:
        """Takes a task; nothing happens before its answer is asked for.

        The caller says `leave` when the client is gone. Raises ResourceExhausted (GATEWAY_FULL),
        InvalidArgument and Unimplemented.
        """
        with self._admission.taking(self._metrics.refused) as slot:
            validate(task, self._config)
            context = task.context
            request_id = context.request_id or f"{task.name}-{uuid.uuid4().hex}"
            return TaskRun(
                self._queue,
                self._preparation,
                task,
                RequestKeys(context.tenant, request_id),
                request_deadline(context.timeout_s, remaining_s, self._config),
                slot,
                TaskObservation(self._metrics, task, request_id),
            )
