"""The whole suite as a user starts it, for tests to ask."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from treadle.process import child_command


@dataclass(frozen=True)
class Suite:
    """A running suite."""

    home: Path
    addresses: dict[str, str]

    def log(self, service: str) -> list[dict[str, object]]:
        """The service's log lines; every one must be JSON."""
        (path,) = (self.home / "run" / "logs").glob(f"{service}*.log")
        return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def running_suite(
    home: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Suite]:
    """`treadle up` in a home of its own, until every service is ready; SIGTERM at the end."""
    output = (home / "up.log").open("w")
    command = [str(Path(sys.executable).parent / "treadle"), "up", *arguments]
    variables = os.environ | {"TREADLE_HOME": str(home)} | dict(environment or {})
    process = subprocess.Popen(child_command(command), env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        addresses = home / "run" / "addresses.json"
        deadline = time.monotonic() + 120
        while not addresses.exists():
            assert process.poll() is None, f"treadle up ended: {(home / 'up.log').read_text()[-4000:]}"
            assert time.monotonic() < deadline, (
                f"not up within 120 s: {(home / 'up.log').read_text()[-4000:]}"
            )
            time.sleep(0.1)
        yield Suite(home, json.loads(addresses.read_text()))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            output.close()
