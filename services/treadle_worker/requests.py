"""The requests that this worker holds, from claim to end: what generations and tasks have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator

from treadle.errors import FailedPrecondition, TreadleError
from treadle.queue import dirty
from treadle.queue.keys import RequestKeys
from treadle.queue.lanes import Delivery
from treadle.queue.log import EntryId
from treadle.telemetry.tracing import NO_SPAN, Span
from treadle_worker.convert_queue import error_entry
from treadle_worker.engine_protocol import AddRequest, AddTask, Ready
from treadle_worker.jobs import Job
from treadle_worker.outgoing import Outgoing


class RunningRequest(ABC):
    """One request under this worker's epoch: takes the engine's outputs in, gives entries out."""

    job: Job
    operation: str
    """What spans call it, in OpenTelemetry's words where it has one."""

    def __init__(
        self, job: Job, delivery: Delivery, epoch: int, *, last: EntryId, watchers: set[str]
    ) -> None:
        """`last` is the log's last entry but fences; `watchers` are the gateways that wait for it."""
        self.job = job
        self.delivery = delivery
        self.epoch = epoch
        self.engine_id = f"{job.request.tag}@{epoch}"
        """Names this run alone: outputs of an earlier one are not mistaken for its own."""
        self.watchers = watchers
        self.deadline: asyncio.TimerHandle | None = None
        self.misses = 0
        """How often in a row no gateway said that the client is there."""
        self.resumed = False
        """Whether another run had begun it."""
        self.span: Span = NO_SPAN
        """From claim to end."""
        self.error: TreadleError | None = None
        """Why it ends, where it does not end well."""
        self._outgoing: Outgoing | None = None
        self._next_number = 1
        self._last = last

    @property
    def keys(self) -> RequestKeys:
        """Its keys in Redis."""
        return self.job.request

    @property
    @abstractmethod
    def num_input_tokens(self) -> int:
        """Tokens that it came with."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens that the engine holds for it."""

    @property
    def num_delivered(self) -> int:
        """Tokens of its answer that earlier owners delivered."""
        return 0

    @property
    def ended(self) -> bool:
        """Whether its end is decided, written or not."""
        return self.error is not None or self._is_complete

    @property
    @abstractmethod
    def _is_complete(self) -> bool:
        """Whether it has ended well."""

    @abstractmethod
    def usage(self) -> dict[str, str | int | list[str]]:
        """What its span says of the answer at its end."""

    @abstractmethod
    def refusal(self, ready: Ready) -> TreadleError | None:
        """Why this engine cannot do it, or None."""

    @abstractmethod
    def start(self) -> AddRequest | AddTask | None:
        """The engine's command; None where what earlier owners delivered had ended it."""

    def fail(self, error: TreadleError) -> None:
        """Ends it with an error, unless it has ended; what was not written yet is dropped."""
        if not self.ended:
            self._drop_unwritten()
            self.error = error

    def _drop_unwritten(self) -> None:
        return

    def outgoing(self) -> Outgoing | None:
        """The entry to write now; the same one until `written` says that it is there."""
        if self._outgoing is None and (following := self._next()) is not None:
            data, is_terminal = following
            self._outgoing = Outgoing(self._next_number, data, is_terminal)
            self._next_number += 1
        return self._outgoing

    @property
    def has_more(self) -> bool:
        """Whether there is anything to write."""
        return self._outgoing is not None or self.ended

    @property
    def may_gather(self) -> bool:
        """Whether all there is to write is more of an answer that flows: it may wait for further tokens."""
        return False

    def written(self) -> bytes:
        """The entry on its way has arrived; what to tell the gateways of it."""
        assert self._outgoing is not None, "only what was on its way arrives"
        id_ = EntryId(self.epoch, self._outgoing.number)
        news = dirty.written(self.keys, id_, self._outgoing.data, self._last)
        self._last, self._outgoing = id_, None
        return news

    def _next(self) -> tuple[bytes, bool] | None:
        """The entry that comes next, with whether it is the end; the end is alone and last."""
        if self.error is not None:
            return error_entry(self.error), True
        return (self._finished(), True) if self._is_complete else None

    @abstractmethod
    def _finished(self) -> bytes:
        """The entry of its good end."""


def not_supported(asked: str, ready: Ready) -> FailedPrecondition:
    """The end of a request that this engine cannot do, by the names that a model's facts have."""
    tasks = ["rerank" if task == "rank" else task for task in ready.tasks]
    able = ", ".join(["generate", *tasks] if ready.generates else tasks)
    return FailedPrecondition(f"the model cannot {asked}; it can: {able}", reason="TASK_NOT_SUPPORTED")


class RequestTable:
    """One model's requests, by what the engine, the lanes and the gateways call them."""

    def __init__(self) -> None:
        self._by_engine_id: dict[str, RunningRequest] = {}
        self._by_keys: dict[RequestKeys, RunningRequest] = {}

    def __len__(self) -> int:
        return len(self._by_keys)

    def __iter__(self) -> Iterator[RunningRequest]:
        return iter(list(self._by_keys.values()))

    def add(self, request: RunningRequest) -> None:
        """Takes a request in; one with the same keys must be removed before."""
        self._by_engine_id[request.engine_id] = request
        self._by_keys[request.keys] = request

    def remove(self, request: RunningRequest) -> None:
        """Forgets a request, and its deadline; one that is not there is no error."""
        if request.deadline is not None:
            request.deadline.cancel()
            request.deadline = None
        if self._by_engine_id.pop(request.engine_id, None) is not None:
            del self._by_keys[request.keys]

    def by_engine_id(self, engine_id: str) -> RunningRequest | None:
        """The request that an output is about; None for one that was dropped."""
        return self._by_engine_id.get(engine_id)

    def by_keys(self, keys: RequestKeys) -> RunningRequest | None:
        """The request that a notice is about."""
        return self._by_keys.get(keys)

    @property
    def entry_ids(self) -> set[tuple[str, str]]:
        """(lane, entry id) of every request."""
        return {(request.delivery.lane, request.delivery.entry_id) for request in self}
