"""One service as a child process: started, looked at until it is ready, started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from treadle.errors import Unavailable
from treadle.local.observer import Observer, ServiceState
from treadle.local.probe import Probe
from treadle.process import child_command

_LOOK_EVERY_S = 0.1
_STABLE_S = 60.0
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Before each restart in a row; after the last the service is given up."""
_MAX_LOG_BYTES = 64 << 20
_KEPT_LOG_BYTES = 1 << 20
_TAIL_LINES = 15
_REAP_S = 10.0


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """How a service is started, known to be ready, and stopped."""

    name: str
    command: tuple[str, ...]
    probe: Probe
    environment: Mapping[str, str] = field(default_factory=dict)
    """All of the child's environment; empty: this process's."""
    stage: int = 0
    """Services of a higher stage are stopped before those of a lower one."""
    start_timeout_s: float = 120.0
    grace_s: float = 15.0
    """From SIGTERM to SIGKILL."""


class ManagedService:
    """Runs a spec until it is stopped or given up."""

    def __init__(self, spec: ServiceSpec, log: Path, observer: Observer) -> None:
        self.spec = spec
        self.log = log
        self.ready = asyncio.Event()
        """Set while the service is ready."""
        self._observer = observer
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Starts the service and keeps it there; returns when it was stopped.

        Raises Unavailable, with the log's tail, when it ends before it was ever ready, or too often in a row.
        """
        self.log.write_bytes(b"")
        was_ready, deaths = False, 0
        while True:
            outcome, ready_for_s = await self._run_once()
            if self._stopping:
                return
            was_ready = was_ready or ready_for_s > 0
            deaths = 1 if ready_for_s >= _STABLE_S else deaths + 1
            if not was_ready or deaths > len(_PAUSES_S):
                self._observer.service(self.spec.name, ServiceState.FAILED, outcome)
                raise self._failure(outcome)
            pause_s = _PAUSES_S[deaths - 1]
            self._observer.service(
                self.spec.name, ServiceState.RESTARTING, f"{outcome}; starts again in {pause_s:g} s"
            )
            await asyncio.sleep(pause_s)

    async def _run_once(self) -> tuple[str, float]:
        """One life: how it ended, and for how many seconds it was ready."""
        started = time.monotonic()
        self._observer.service(self.spec.name, ServiceState.STARTING)
        process = self._process = self._start()
        self._gone.clear()
        try:
            while process.poll() is None and not await self.spec.probe():
                if time.monotonic() - started > self.spec.start_timeout_s:
                    return f"not ready within {self.spec.start_timeout_s:g} s", 0.0
                await asyncio.sleep(_LOOK_EVERY_S)
            if process.poll() is not None:
                return _ended(process.returncode), 0.0
            became_ready = time.monotonic()
            self.ready.set()
            self._observer.service(
                self.spec.name, ServiceState.READY, f"after {became_ready - started:.1f} s"
            )
            while process.poll() is None:
                self._bound_log()
                await asyncio.sleep(_LOOK_EVERY_S)
            return _ended(process.returncode), time.monotonic() - became_ready
        finally:
            self.ready.clear()
            self._gone.set()
            if not self._stopping:
                self._end_group()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                child_command(self.spec.command),
                env=dict(self.spec.environment) or None,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: a terminal's Ctrl-C is for the supervisor, which stops all in order.
                process_group=0,
            )

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after the grace period; returns when the process is gone."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        self._observer.service(self.spec.name, ServiceState.STOPPING)
        process.terminate()
        detail = ""
        try:
            async with asyncio.timeout(self.spec.grace_s):
                await self._gone.wait()
        except TimeoutError:
            detail = f"killed after {self.spec.grace_s:g} s"
        self._end_group()
        self._observer.service(self.spec.name, ServiceState.STOPPED, detail)

    def kill(self) -> None:
        """Ends the service at once, for good."""
        self._stopping = True
        self._end_group()

    def _end_group(self) -> None:
        """Kills the process, and what it left behind of its own children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_REAP_S)

    def tail(self) -> str:
        """The last lines of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 16_384))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def _failure(self, outcome: str) -> Unavailable:
        return Unavailable(
            f"{self.spec.name}: {outcome}. Its log is {self.log} and ends with:\n{self.tail()}",
            reason="SERVICE_FAILED",
            metadata={"service": self.spec.name, "log": str(self.log)},
        )

    def _bound_log(self) -> None:
        # The child appends, so that it goes on at the new end; lines of this very instant may be lost.
        if self.log.stat().st_size > _MAX_LOG_BYTES:
            with self.log.open("r+b") as log:
                log.seek(-_KEPT_LOG_BYTES, os.SEEK_END)
                kept = log.read().partition(b"\n")[2]
                log.seek(0)
                log.write(kept)
                log.truncate()


def _ended(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
