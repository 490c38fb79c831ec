"""A service can be told to leave before it has imported what it needs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVICES = ("gateway", "registry", "tokenizer", "trainer")
_SIGTERM_BIT = 1 << (signal.SIGTERM - 1)


def catches_sigterm(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) & _SIGTERM_BIT)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which signals a process catches")
@pytest.mark.parametrize("service", SERVICES)
def test_sigterm_is_caught_before_the_imports(tmp_path: Path, service: str):
    """The first process of a container is not ended by a signal that it does not catch."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"treadle_{service}"],
        env=os.environ
        | {f"TREADLE_{service.upper()}_ADDRESS": "127.0.0.1:0", "TREADLE_STORE": str(tmp_path / "store")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not catches_sigterm(process):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        grpc_is_there = "cygrpc" in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert not grpc_is_there, "SIGTERM was caught only after gRPC had been imported"
    assert process.returncode in (128 + signal.SIGTERM, 0)
    assert "Traceback" not in errors
