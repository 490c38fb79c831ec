"""Treadle's whole suite as a user starts it: `treadle up`, in a home where the model is imported already."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
from engines.treadle_engine import settings
from soak_readings import suite_processes

from harness import models
from harness.places import MODELS
from treadle.local import Home
from treadle.process import child_command

_UP_S = 120.0
_DOWN_S = 60.0


@dataclass(frozen=True)
class Suite:
    """A running suite; every service is ready."""

    process: psutil.Process
    address: str
    """The gateway's."""
    addresses: Mapping[str, str]

    def processes(self) -> dict[str, psutil.Process]:
        """The suite's processes by name; see `soak_readings`."""
        return suite_processes(self.process)


def engine_variables(dtype: str, **options: object) -> dict[str, str]:
    """The environment that gives engines these settings (EngineConfig's fields); raises ValueError."""
    return {
        f"TREADLE_ENGINE_{name.upper()}": str(value) for name, value in (settings(dtype) | options).items()
    }


@contextlib.contextmanager
def started(
    variables: Mapping[str, str], served: Sequence[str] = (models.ALIAS,)
) -> Iterator[subprocess.Popen[bytes]]:
    """`treadle up`, just started, serving those aliases; SIGTERM at the end. Its address comes by
    `until_up`."""
    home, log = models.home(), _log()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).parent / "treadle"), "up", "--port", "0"]
    command += [f"--model={alias}" for alias in served]
    with log.open("wb") as output:
        process = subprocess.Popen(
            child_command(command),
            env={**os.environ, "TREADLE_HOME": str(home), **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_DOWN_S)
        finally:
            process.kill()


def until_up(process: subprocess.Popen[bytes]) -> Suite:
    """Waits until the suite is ready; raises RuntimeError, with its log, where it ends or takes too long."""
    home = Home(models.home())
    deadline = time.monotonic() + _UP_S
    while not (addresses := home.read_addresses()):
        if process.poll() is not None or time.monotonic() > deadline:
            log = _log().read_text()
            raise RuntimeError(f"the suite is not up:\n{log[-2000:]}")
        time.sleep(0.02)
    return Suite(psutil.Process(process.pid), addresses["gateway"], addresses)


def _log() -> Path:
    return MODELS / "logs" / "suite.log"


@contextlib.contextmanager
def suite(
    dtype: str = "bf16",
    *,
    served: Sequence[str] = (models.ALIAS,),
    environment: Mapping[str, str] = MappingProxyType({}),
    **options: object,
) -> Iterator[Suite]:
    """A running suite whose engines have these weights and settings; raises ValueError for unknown ones.

    `environment`: further variables.
    """
    with started({**engine_variables(dtype, **options), **environment}, served) as process:
        yield until_up(process)
