"""One service on a port of its own choosing, which its log names."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from treadle.process import child_command


@contextlib.contextmanager
def started(
    kind: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`python -m treadle_<kind>` and its address, once it listens."""
    variables = os.environ | {
        f"TREADLE_{kind.upper()}_ADDRESS": "127.0.0.1:0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = child_command([sys.executable, "-m", f"treadle_{kind}"])
    variables |= dict(environment or {})
    with log.open("w") as output, subprocess.Popen(command, env=variables, stderr=output) as process:
        try:
            yield process, f"127.0.0.1:{listening_port(process, log)}"
        finally:
            process.kill()


def listening_port(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port that the log names, within 30 s."""
    for _ in range(600):
        for line in log.read_text().splitlines():
            if (entry := json.loads(line))["message"] == "listening":
                return int(entry["port"])
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    pytest.fail(f"the service did not listen: {log.read_text()}")
