"""A service as a process of its own, for tests that decide who lives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from treadle.process import child_command

START_TIMEOUT_S = 90.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class ServiceProcess:
    """`python -m treadle_<kind>` at an address, in a process group of its own; it dies with the tests."""

    def __init__(
        self,
        name: str,
        kind: str,
        address: str,
        metrics_address: str,
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        """`environment` is what it has beyond the addresses and this process's own."""
        self.name = name
        self.address = address
        """ "host:port"; the same again after a restart."""
        self._kind = kind
        self._metrics_address = metrics_address
        self._environment = (
            dict(os.environ)
            | dict(environment)
            | {
                f"TREADLE_{kind.upper()}_ADDRESS": address,
                f"TREADLE_{kind.upper()}_METRICS_ADDRESS": metrics_address,
                f"TREADLE_{kind.upper()}_NAME": name,
            }
        )
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it must not run."""
        assert not self.alive, f"{self.name} runs already"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                child_command([sys.executable, "-m", f"treadle_{self._kind}"]),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def until_ready(self) -> None:
        """Waits until its health service says SERVING."""
        deadline = time.monotonic() + START_TIMEOUT_S
        backoff = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
        with grpc.insecure_channel(self.address, backoff) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.RpcError):
                    if health.Check(health_pb2.HealthCheckRequest(), timeout=2).status == SERVING:
                        return
                assert self.alive, f"{self.name} ended:\n{self.tail()}"
                assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.tail()}"
                time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before it ever did."""
        return None if self._process is None else self._process.poll()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self.exit_code is None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the service's process alone."""
        os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        """Sends a signal to the service and all its children."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL for the whole group, and the wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            self.signal_group(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(10)

    def children(self) -> list[psutil.Process]:
        """Its child processes: a worker's engine, a tokenizer's template renderers."""
        return psutil.Process(self.pid).children()

    @property
    def resident_bytes(self) -> int:
        """Memory of the service's process."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def metrics(self) -> dict[str, float]:
        """What it counts now, labels summed up: "treadle:num_requests_running", "…_bucket{le=0.1}", …"""
        with urllib.request.urlopen(f"http://{self._metrics_address}/metrics", timeout=5) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = f"{sample.name}{{le={sample.labels['le']}}}" if "le" in sample.labels else sample.name
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def log(self) -> list[dict[str, Any]]:
        """Every line that it, and what ran under its name before, wrote."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def tail(self) -> str:
        """The log's last lines."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
