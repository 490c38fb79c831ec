"""The folder of a local suite: what lies where, and that one suite at a time uses it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import FailedPrecondition

_LOCK_PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True)
class Home:
    """`store/` is the registry's; `run/` is the running suite's, and may be removed when nothing runs."""

    path: Path

    @property
    def store(self) -> Path:
        """The model store."""
        return self.path / "store"

    @property
    def run(self) -> Path:
        """What belongs to the running suite."""
        return self.path / "run"

    @property
    def logs(self) -> Path:
        """One log a service."""
        return self.run / "logs"

    @property
    def valkey(self) -> Path:
        """The embedded Valkey's append-only file."""
        return self.run / "valkey"

    @property
    def _addresses(self) -> Path:
        return self.run / "addresses.json"

    @property
    def metrics_targets(self) -> Path:
        """Where each service's metrics are; stays behind when the suite ends, and is written anew."""
        return self.run / "metrics-targets.json"

    @property
    def _lock(self) -> Path:
        return self.run / "lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the home for this process, also against others' addresses.

        Raises FailedPrecondition, naming the running suite, while another process holds it.
        """
        for folder in (self.store, self.logs, self.valkey):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            self._addresses.unlink(missing_ok=True)
            try:
                yield
            finally:
                self._addresses.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        # Somebody who merely looks holds the lock for an instant, too.
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise FailedPrecondition(self._occupied(), reason="ALREADY_RUNNING") from error

    def _occupied(self) -> str:
        gateway = (self.read_addresses() or {}).get("gateway")
        where = f"with its gateway at {gateway}" if gateway else "and is still starting"
        holder = self._lock.read_text() or "unknown"
        return (
            f"a suite runs in {self.path} already (process {holder}), {where}; ask it with `treadle status`, "
            "stop it, or set TREADLE_HOME to another folder"
        )

    def write_addresses(self, addresses: Mapping[str, str]) -> None:
        """Tells where a suite that is ready listens; the file appears whole."""
        _write(self._addresses, dict(addresses))

    def write_metrics_targets(self, addresses: Mapping[str, str]) -> None:
        """Tells Prometheus where each service's metrics are, in its own form (`file_sd_configs`)."""
        targets = [
            {"targets": [address], "labels": {"service": name.partition("-")[0], "replica": name}}
            for name, address in addresses.items()
        ]
        _write(self.metrics_targets, targets)

    def read_addresses(self) -> dict[str, str] | None:
        """Where the services of the suite in this home listen; None when there is none, or not yet."""
        try:
            descriptor = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                return dict(json.loads(self._addresses.read_text()))
            except FileNotFoundError:
                return None
        finally:
            os.close(descriptor)
        return None


def _write(path: Path, content: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
