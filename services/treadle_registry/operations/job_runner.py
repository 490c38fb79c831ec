"""Starts a job's process and listens to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from pathlib import Path

from treadle.errors import Internal, TreadleError
from treadle.process import child_command
from treadle_registry.operations.job import Job, Outcome, encode_job, event_from_json
from treadle_registry.operations.progress import Progress, Report

logger = logging.getLogger(__name__)

_LINE_LIMIT = 1 << 20
_LAST_WORDS = 2000


class JobProcess:
    """One child. Cancelling `run` kills it; what it leaves half done counts for nothing, and is swept up."""

    def __init__(self, store: Path, job: Job) -> None:
        self._job = encode_job(store, job)
        self.pid: int | None = None
        """The child's process id while it runs."""

    async def run(self, report: Report) -> Outcome:
        """Runs to the end; raises what the job raised, or Internal when the child died.

        The caller is the event loop's main thread: the child dies with the thread that started it.
        """
        process = await asyncio.create_subprocess_exec(
            *child_command([sys.executable, "-m", "treadle_registry.operations.job_process"]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            process_group=0,
        )
        self.pid = process.pid
        assert process.stderr is not None
        words = asyncio.create_task(_last_words(process.stderr))
        try:
            return await self._listen(process, words, report)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            words.cancel()
            await asyncio.gather(words, return_exceptions=True)
            self.pid = None

    async def _listen(
        self, process: asyncio.subprocess.Process, words: asyncio.Task[str], report: Report
    ) -> Outcome:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(self._job)
            await process.stdin.drain()
        async for line in process.stdout:
            event = event_from_json(json.loads(line))
            if isinstance(event, TreadleError):
                raise event
            if not isinstance(event, Progress):
                return event
            report(event)
        code = await process.wait()
        logger.error("a job's process died", extra={"exit_code": code, "last_words": await words})
        raise Internal(
            f"the job's process ended with {code} and no result; the registry's log has its last words",
            reason="JOB_DIED",
        )


async def _last_words(stream: asyncio.StreamReader) -> str:
    """The end of what the child wrote to standard error."""
    kept = b""
    while chunk := await stream.read(4096):
        kept = (kept + chunk)[-_LAST_WORDS:]
    return kept.decode(errors="replace").strip()
