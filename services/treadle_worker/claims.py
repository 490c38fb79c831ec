"""From a lane's entry to a running request: who has it, has it ended, what was delivered, go on.

Nothing is decided before the fence stands: what the log says behind it can no longer change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from redis.asyncio import Redis

from treadle.errors import DataLoss, DeadlineExceeded, FailedPrecondition
from treadle.queue import lanes
from treadle.queue.epochs import Taken, take
from treadle.queue.lanes import Delivery
from treadle.text.tokenizer import Tokenizer
from treadle_worker.clock import RedisClock
from treadle_worker.convert_queue import to_history, to_job
from treadle_worker.generations import RunningGeneration
from treadle_worker.jobs import GenerationJob, History, Job, TaskJob
from treadle_worker.requests import RequestTable, RunningRequest
from treadle_worker.tasks import RunningTask

logger = logging.getLogger(__name__)


class Claimer:
    """Turns deliveries into requests; `start` is called once for each request that this worker now owns."""

    def __init__(
        self,
        redis: Redis,
        consumer: str,
        table: RequestTable,
        clock: RedisClock,
        tokenizer: Tokenizer,
        start: Callable[[RunningRequest], None],
        expire: Callable[[RunningRequest], None],
    ) -> None:
        self._redis = redis
        self._consumer = consumer
        self._table = table
        self._clock = clock
        self._tokenizer = tokenizer
        self._start = start
        self._expire = expire
        self.too_new: set[tuple[str, str]] = set()
        """(lane, entry id) of entries of a later schema: a newer worker gets them when this one ends."""
        self.num_claimed = 0
        """Requests taken, those that had ended among them."""
        self.num_resumed = 0
        """Requests that another run had begun."""

    async def claim(self, deliveries: Sequence[Delivery]) -> None:
        """Takes what was delivered; raises Unavailable, and then the entries come again as strays."""
        jobs: dict[Delivery, Job] = {}
        useless: list[Delivery] = []
        for delivery in deliveries:
            try:
                jobs[delivery] = to_job(delivery.data)
            except FailedPrecondition:
                logger.warning("a lane entry of a later schema is left alone", extra={"lane": delivery.lane})
                self.too_new.add((delivery.lane, delivery.entry_id))
            except DataLoss:
                logger.exception("a lane entry cannot be read and is deleted", extra={"lane": delivery.lane})
                useless.append(delivery)
        useless += await self._set_aside(jobs)
        taken = await take(self._redis, [job.request for job in jobs.values()], self._consumer)
        for (delivery, job), found in zip(jobs.items(), taken, strict=True):
            if found is None or found.terminal is not None:
                useless.append(delivery)
            else:
                self._begin(delivery, job, found)
        await lanes.remove(self._redis, useless)

    async def _set_aside(self, jobs: dict[Delivery, Job]) -> list[Delivery]:
        """Takes out of `jobs` what another worker runs, and second entries, which it returns.

        What another worker runs goes to that worker. It may be the very entry that the request lives by: this
        worker was given it, then stopped for longer than its lease. Only who runs a request knows that.
        """
        owners = await lanes.owners(self._redis, [job.request for job in jobs.values()])
        second, elsewhere, seen = [], {}, set()
        for (delivery, job), owner in zip(list(jobs.items()), owners, strict=True):
            running = self._table.by_keys(job.request)
            if owner is not None and owner != self._consumer:
                elsewhere[delivery] = owner
                del jobs[delivery]
            elif job.request in seen or (running is not None and running.delivery != delivery):
                second.append(delivery)
                del jobs[delivery]
            seen.add(job.request)
        await lanes.give(self._redis, elsewhere)
        return second

    def _begin(self, delivery: Delivery, job: Job, taken: Taken) -> None:
        if (before := self._table.by_keys(job.request)) is not None:
            self._table.remove(before)
        history = to_history(taken.entries)
        request = self._running(job, delivery, taken, history)
        request.resumed = any(
            entry.HasField("fence") and id_.epoch != taken.epoch for id_, entry in taken.entries
        )
        # Nobody spoke for the client all the time that the request waited: the first look is done.
        request.misses = 0 if taken.attached else 1
        self.num_claimed += 1
        self.num_resumed += request.resumed
        self._table.add(request)
        logger.info(
            "took a request",
            extra={
                "request_id": job.request.request_id,
                "tenant": job.request.tenant,
                "epoch": taken.epoch,
                "operation": request.operation,
                "prompt_tokens": request.num_input_tokens,
                "delivered_tokens": request.num_delivered,
            },
        )
        if job.tokenizer_digest and job.tokenizer_digest != self._tokenizer.digest:
            request.fail(_foreign_ids(job, self._tokenizer))
        elif job.timeout_ms:
            left_ms = delivery.added_ms + job.timeout_ms - self._clock.now_ms()
            if left_ms <= 0:
                request.fail(too_late())
            else:
                loop = asyncio.get_running_loop()
                request.deadline = loop.call_later(left_ms / 1000, self._expire, request)
        self._start(request)

    def _running(self, job: Job, delivery: Delivery, taken: Taken, history: History) -> RunningRequest:
        watchers = set(taken.watchers)
        if isinstance(job, TaskJob):
            return RunningTask(job, delivery, taken.epoch, last=history.last, watchers=watchers)
        assert isinstance(job, GenerationJob), "there are these two kinds"
        return RunningGeneration(
            job, delivery, taken.epoch, tokenizer=self._tokenizer, history=history, watchers=watchers
        )


def _foreign_ids(job: Job, tokenizer: Tokenizer) -> FailedPrecondition:
    """The end of a request in a lane of equal weights, but of another tokenizer."""
    return FailedPrecondition(
        f"the ids are of {job.tokenizer_digest}, but this worker serves the weights with "
        f"{tokenizer.digest}; send the request again",
        reason="TOKENIZER_MISMATCH",
    )


def too_late() -> DeadlineExceeded:
    """The end of a request whose time was up."""
    return DeadlineExceeded("the request's time was up before its answer was complete")
