"""Jobs as operations: started once a request_id, followed, cancelled, remembered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from dataclasses import dataclass, field

from treadle.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    TreadleError,
    invalid_field,
)
from treadle_registry.catalog.operations import StoredOperation
from treadle_registry.eviction import Eviction
from treadle_registry.names import check_alias
from treadle_registry.operations.job import (
    DeriveJob,
    Imported,
    ImportJob,
    Job,
    Outcome,
    event_from_json,
    event_to_json,
    job_from_json,
    job_to_json,
)
from treadle_registry.operations.job_lease import leased
from treadle_registry.operations.job_runner import JobProcess
from treadle_registry.operations.progress import Progress, Stage
from treadle_registry.pages import LAST, page_of, page_size, read_token
from treadle_registry.registry import Registry

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
_MAX_REQUEST_ID = 128
_PREFIX = "operations/"
LISTING = "operations"


@dataclass(frozen=True, slots=True)
class OperationRequest:
    """What is asked; `alias`, where it is not empty, shall name the artifact that comes of it."""

    job: Job
    alias: str = ""

    def check(self) -> None:
        """Raises InvalidArgument that names the field."""
        if self.alias:
            check_alias(self.alias, "alias")
        self.job.check()

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps({"job": job_to_json(self.job), "alias": self.alias}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> OperationRequest:
        """What `to_json` wrote, also before there were other jobs than imports."""
        raw = json.loads(text)
        job = raw.get("job") or {"kind": ImportJob.kind} | raw
        return cls(job_from_json(job), raw["alias"])


@dataclass(slots=True)
class Operation:
    """A job that waits, runs or has ended. `outcome` is None until it has."""

    name: str
    request: OperationRequest
    create_time: float
    progress: Progress = field(default_factory=lambda: Progress(Stage.CHECKING))
    outcome: Outcome | TreadleError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    cancelling: bool = False
    publishing: bool = False


class Operations:
    """All jobs of one registry; at most `max_running` at once and `max_waiting` behind them."""

    def __init__(
        self, registry: Registry, eviction: Eviction, *, max_running: int, max_waiting: int, kept: int
    ) -> None:
        self._registry, self._eviction = registry, eviction
        self._turn = asyncio.Semaphore(max_running)
        self._most = max_running + max_waiting
        self._kept = kept
        self._starting = asyncio.Lock()
        self._live: dict[str, Operation] = {}
        self._unkept: dict[str, Operation] = {}
        """What has ended while that could not be written; the next registry says that it was interrupted."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.processes: dict[str, JobProcess] = {}
        """Running children by operation."""

    async def recover(self) -> int:
        """Ends what a registry that died left running; gives how many that were."""
        error = Aborted(
            "the registry was restarted while the job ran; start it again with a new request_id",
            reason="INTERRUPTED",
        )
        outcome = json.dumps(event_to_json(error))
        return await self._registry.in_thread(self._registry.catalog.operations.finish_unfinished, outcome)

    async def close(self) -> None:
        """Kills what runs; the next registry says that it was interrupted."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def start(self, request_id: str, request: OperationRequest) -> Operation:
        """Starts a job, or gives the one that the request_id started before.

        Raises InvalidArgument, Unimplemented, AlreadyExists for another request under that id, and
        ResourceExhausted when too many wait.
        """
        if len(request_id) > _MAX_REQUEST_ID:
            raise invalid_field("request_id", f"must have at most {_MAX_REQUEST_ID} characters")
        request.check()
        payload = request.to_json()
        name = _PREFIX + uuid.uuid4().hex
        entry = StoredOperation(name, request_id or name, payload, time.time(), None)
        async with self._starting:
            # A repetition is answered however much is going on, so room is looked for only afterwards.
            room = len(self._live) < self._most
            kept = await self._registry.in_thread(self._keep, entry, room)
            if kept.name == name:
                self._begin(Operation(name, request, entry.create_time))
        if OperationRequest.from_json(kept.payload) != request:
            raise AlreadyExists(
                f"the request_id {request_id!r} belongs to another request; choose a new one",
                reason="REQUEST_ID_REUSED",
            )
        return self._known(kept.name) or _revive(kept)

    def _keep(self, entry: StoredOperation, room: bool) -> StoredOperation:
        catalog = self._registry.catalog
        known = catalog.operations.of_request(entry.request_id)
        if known is None and not room:
            raise ResourceExhausted(
                f"{self._most} operations run or wait already",
                reason="TOO_MANY_OPERATIONS",
                retry_after_s=_RETRY_AFTER_S,
            )
        if known is None:
            catalog.operations.prune(self._kept)
        return known or catalog.operations.add(entry)

    def _begin(self, operation: Operation) -> None:
        self._live[operation.name] = operation
        task = asyncio.create_task(self._run(operation), name=operation.name)
        self._tasks[operation.name] = task

    async def _run(self, operation: Operation) -> None:
        """Waits for its turn, runs the child, and makes the end known."""
        try:
            async with self._parent(operation), self._turn:
                outcome = await self._work(operation)
        except TreadleError as error:
            await self._end(operation, error)
        except asyncio.CancelledError:
            # At the registry's own end nothing is written: the next one says that it was interrupted.
            if operation.cancelling:
                called_off = Cancelled("the operation was cancelled", reason="CANCELLED_BY_CLIENT")
                await self._end(operation, called_off)
            raise
        except Exception as error:
            await self._end(operation, _our_fault(operation, error))
        else:
            await self._adopt(operation, outcome)

    def _parent(self, operation: Operation) -> contextlib.AbstractAsyncContextManager[None]:
        """Holds what a derivation is made of."""
        job = operation.request.job
        if isinstance(job, DeriveJob):
            return leased(self._registry, job.parent_digest, operation.name)
        return contextlib.nullcontext()

    async def _work(self, operation: Operation) -> Outcome:
        """Runs the job, anew for as long as the disk is full and room can be made on it."""
        while True:
            try:
                return await self._once(operation)
            except ResourceExhausted as error:
                if error.reason != "DISK_FULL" or not await self._made_room(operation, error):
                    raise
                logger.info("room was made, the job is run again", extra={"operation": operation.name})

    async def _made_room(self, operation: Operation, error: ResourceExhausted) -> bool:
        # What the job has left takes room, too.
        await self._registry.in_thread(self._registry.store.sweep)
        # What was copied, and what was to be made of it, where the job did not say what it needs.
        needed = int(error.metadata.get("needed_bytes", 2 * operation.progress.total_bytes))
        return await self._eviction.make_room_on_disk(needed)

    async def _once(self, operation: Operation) -> Outcome:
        process = JobProcess(self._registry.store.root, operation.request.job)
        self.processes[operation.name] = process

        def report(progress: Progress) -> None:
            operation.progress = progress

        try:
            return await process.run(report)
        finally:
            del self.processes[operation.name]

    async def _adopt(self, operation: Operation, done: Outcome) -> None:
        """An artifact is in the store: from here on the job is not called off any more."""
        operation.publishing = True
        outcome: Outcome | TreadleError = done
        if isinstance(done, Imported) and done.manifest.digest:
            try:
                await self._registry.adopt(done, operation.request.alias)
            except TreadleError as error:
                outcome = error
            except Exception as error:
                outcome = _our_fault(operation, error)
            await self._eviction.make_room(spared=done.manifest.digest)
        await self._end(operation, outcome)

    async def _end(self, operation: Operation, outcome: Outcome | TreadleError) -> None:
        operation.outcome = outcome
        logger.info(
            "operation ended",
            extra={
                "operation": operation.name,
                "kind": operation.request.job.kind,
                "reason": outcome.reason if isinstance(outcome, TreadleError) else "",
                "artifact": outcome.manifest.digest if isinstance(outcome, Imported) else "",
            },
        )
        text = json.dumps(event_to_json(outcome) | {"at": event_to_json(operation.progress)})
        try:
            await self._keep_end(operation, text)
            if isinstance(outcome, TreadleError):
                await self._clean_up(operation)
        finally:
            operation.ended.set()
            self._live.pop(operation.name, None)
            self._tasks.pop(operation.name, None)

    async def _clean_up(self, operation: Operation) -> None:
        """Removes what the job left, and adopts what it had published before it was killed."""
        try:
            await self._registry.in_thread(self._registry.store.sweep)
            await self._registry.adopt_strays()
        except Exception as error:
            # The next start of the registry does the same.
            logger.warning(
                "what a job left stays for now", extra={"operation": operation.name, "cause": str(error)}
            )

    async def _keep_end(self, operation: Operation, text: str) -> None:
        """Writes how it ended, or remembers that while that is impossible: whoever waits must hear of it."""
        try:
            await self._registry.in_thread(self._registry.catalog.operations.finish, operation.name, text)
        except Exception as error:
            logger.error(
                "how an operation ended cannot be kept",
                extra={"operation": operation.name, "cause": str(error)},
            )
            self._unkept[operation.name] = operation
            while len(self._unkept) > self._kept:
                del self._unkept[next(iter(self._unkept))]

    def _known(self, name: str) -> Operation | None:
        """An operation that lives, or has ended and is in no catalog."""
        return self._live.get(name) or self._unkept.get(name)

    async def get(self, name: str) -> Operation:
        """The operation; raises NotFound."""
        return self._known(name) or _revive(
            await self._registry.in_thread(self._registry.catalog.operations.get, name)
        )

    async def wait(self, name: str, timeout_s: float) -> Operation:
        """The operation once it has ended, or as it is when the time is up."""
        operation = await self.get(name)
        if operation.outcome is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(operation.ended.wait(), timeout_s)
        return operation

    async def list(self, size: int, token: str) -> tuple[list[tuple[int, Operation]], str]:
        """A page of operations, newest first, by numbers that fall, and the next page's token."""
        limit, before = page_size(size), int(read_token(token, LISTING, LAST))
        rows = await self._registry.in_thread(self._registry.catalog.operations.page, before, limit + 1)
        page, following = page_of(rows, limit, LISTING, lambda row: row[0])
        return [(number, self._known(stored.name) or _revive(stored)) for number, stored in page], following

    async def cancel(self, name: str) -> None:
        """Kills the job unless it has ended or is all but done; raises NotFound."""
        operation = await self.get(name)
        task = self._tasks.get(name)
        if task is None:
            return
        if not operation.cancelling and not operation.publishing:
            operation.cancelling = True
            task.cancel()
        await asyncio.wait([task])

    async def delete(self, name: str) -> None:
        """Forgets an ended operation; raises NotFound, and FailedPrecondition while it runs."""
        if name in self._live:
            raise FailedPrecondition(f"{name} still runs; cancel it first", reason="OPERATION_RUNS")
        await self._registry.in_thread(self._registry.catalog.operations.delete, name)
        self._unkept.pop(name, None)


def _our_fault(operation: Operation, error: Exception) -> Internal:
    """For an exception that nobody foresaw."""
    logger.error("an operation failed", exc_info=error, extra={"operation": operation.name})
    return Internal("the operation failed; the registry's log has the details")


def _revive(stored: StoredOperation) -> Operation:
    """An ended operation out of the catalog."""
    request = OperationRequest.from_json(stored.payload)
    operation = Operation(stored.name, request, stored.create_time)
    if stored.outcome is not None:
        outcome = json.loads(stored.outcome)
        if "at" in outcome:
            progress = event_from_json(outcome["at"])
            assert isinstance(progress, Progress)
            operation.progress = progress
        ended = event_from_json(outcome)
        assert not isinstance(ended, Progress)
        operation.outcome = ended
        operation.ended.set()
    return operation
