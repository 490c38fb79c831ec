"""A task: submitted, followed to its one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from treadle.api.worker.v1.queue_pb2 import LaneEntry, TaskResult, Terminal
from treadle.errors import Internal, invalid_field
from treadle.queue.keys import RequestKeys
from treadle.rpc.channel import MAX_MESSAGE_BYTES
from treadle_gateway.admission import Slot
from treadle_gateway.convert import from_status
from treadle_gateway.deadlines import Deadline, out_of_time
from treadle_gateway.hold import Hold, Queue
from treadle_gateway.subscriptions import Subscription
from treadle_gateway.tasks.convert import to_lane_entry
from treadle_gateway.tasks.observation import TaskObservation
from treadle_gateway.tasks.preparation import TaskPreparation
from treadle_gateway.tasks.task import Task
from treadle_gateway.tasks.work import Prepared, TaskAnswer

R = TypeVar("R", bound=Message)

_LARGE_RESULT_BYTES = 16 << 10
"""A result from this size on is read in a thread: a million of them are a second of Python."""
_ENVELOPE_BYTES = 1 << 10
"""What a stream puts around an answer, at most: its place and its request's id."""


class TaskRun(Hold):
    """A task from its preparation to its answer; `leave` is safe at any time."""

    def __init__(
        self,
        queue: Queue,
        preparation: TaskPreparation,
        task: Task,
        request: RequestKeys,
        deadline: Deadline,
        slot: Slot,
        observation: TaskObservation,
    ) -> None:
        super().__init__(
            queue,
            request,
            deadline,
            slot,
            observation,
            payload_digest=task.context.payload_digest,
            is_retry=bool(task.context.request_id),
        )
        self._preparation = preparation
        self._task = task
        self._observation = observation
        self._prepared: Prepared | None = None

    async def answer(self, to_response: Callable[[TaskAnswer], R]) -> R:
        """The answer as a message.

        Raises what the task ended with, Internal for a result that is none, InvalidArgument
        (ANSWER_TOO_LARGE) for one that cannot be sent, and DeadlineExceeded.
        """
        with self._held():
            result = await self._result(await self._enter(self._prepare))
            prepared = await self._prepared_for(result)

            def read() -> R:
                outcome = prepared.plan.read(result.data)
                tokens = prepared.prompt_tokens
                return to_response(TaskAnswer(result.artifact_digest, result.profile, tokens, outcome))

            is_large = len(result.data) >= _LARGE_RESULT_BYTES
            response = await self._deadline.bound(asyncio.to_thread(read)) if is_large else read()
            _check_sendable(response)
            self._observation.answered(prepared.prompt_tokens)
            return response

    async def _prepare(self) -> LaneEntry:
        request, deadline = self.request, self._deadline
        self._prepared = await self._preparation.prepare(self._task, request.request_id, deadline)
        return to_lane_entry(
            self._task,
            request,
            self._prepared,
            gateway_id=self._queue.gateway_id,
            timeout_ms=deadline.remaining_ms(),
            traceparent=self._observation.span.traceparent,
        )

    async def _prepared_for(self, result: TaskResult) -> Prepared:
        """What the result is a result of: where it was queued by another call, perhaps for another model."""
        prepared = self._prepared
        if prepared is not None:
            model = prepared.model
            if (model.artifact.digest, model.profile) == (result.artifact_digest, result.profile):
                return prepared
        return await self._preparation.prepare_for(
            self._task, result.artifact_digest, result.profile, self._deadline
        )

    async def _result(self, subscription: Subscription) -> TaskResult:
        with self._deadline.tells(lambda: subscription.fail(out_of_time())):
            while not self._deadline.passed:
                for _, entry in await subscription.next():
                    if entry.HasField("terminal"):
                        self._ended = True
                        return _outcome(entry.terminal)
        raise out_of_time()


def _check_sendable(response: Message) -> None:
    """Raises InvalidArgument; gRPC would end the call, and with it all other items of a stream."""
    size, most = response.ByteSize(), MAX_MESSAGE_BYTES - _ENVELOPE_BYTES
    if size > most:
        raise invalid_field(
            "inputs",
            f"have an answer of {size} bytes, at most {most} can be sent; send fewer a request, or ask for "
            "less of each (top_k, dimensions)",
            reason="ANSWER_TOO_LARGE",
        )


def _outcome(terminal: Terminal) -> TaskResult:
    if terminal.HasField("task_result"):
        return terminal.task_result
    status: Status = terminal.error
    if not terminal.HasField("error"):
        raise Internal("the worker ended a task as it ends a generation; is it of an older version?")
    raise from_status(status)
