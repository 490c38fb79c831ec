"""Tasks that outlive the call that started them: owned, logged when they fail, awaited at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from treadle.errors import TreadleError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BackgroundTasks:
    """Owns tasks until they are done; their number is bounded by the calls that start them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Starts `work` as a task of its own."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        # What the suite says went wrong, the caller who still waits is told.
        level = logging.DEBUG if isinstance(error, TreadleError) else logging.ERROR
        logger.log(level, "a background task failed", exc_info=error, extra={"task": task.get_name()})

    async def finish(self, timeout_s: float) -> None:
        """Waits for what runs; what still runs after `timeout_s` is cancelled."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        rest = list(self._tasks)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
