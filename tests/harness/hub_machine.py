"""A machine of its own that imports from a hub: a Hugging Face home, a store, and jobs in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hub_server import HubServer

from treadle.errors import TreadleError
from treadle.process import child_command
from treadle_registry.operations.job import Imported, ImportJob, encode_job, event_from_json
from treadle_registry.operations.progress import Progress
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.store.store import Store


class RunningImport:
    """An import's process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.progress: list[Progress] = []

    def kill(self) -> None:
        """SIGKILL, and the wait for its end."""
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def until(self, reached: Callable[[Progress], bool]) -> Progress:
        """Reads until it tells such a progress."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = event_from_json(json.loads(line))
            assert isinstance(event, Progress), event
            self.progress.append(event)
            if reached(event):
                return event
        raise AssertionError("the import's process ended before")

    def result(self) -> Imported:
        """How it ended; raises what it says went wrong."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = event_from_json(json.loads(line))
            if isinstance(event, TreadleError):
                raise event
            if isinstance(event, Progress):
                self.progress.append(event)
                continue
            assert isinstance(event, Imported)
            return event
        raise AssertionError(f"the import's process ended with {self.process.wait(10)} and no result")


class HubMachine:
    """Where imports of one user run."""

    def __init__(
        self, folder: Path, hub: HubServer, *, inside: Sequence[str] = (), **environment: str
    ) -> None:
        """`inside` is a command that runs others, in a namespace of its own."""
        self.home, self.folder, self._inside = folder / "hf", folder, list(inside)
        self.cache = self.home / "hub"
        self.store = Store.open(folder / "store")
        unwanted = [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]
        self.environment = {name: value for name, value in os.environ.items() if name not in unwanted} | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            **environment,
        }

    def start(self, source: HubSource, *, validate_only: bool = False, **environment: str) -> RunningImport:
        """Starts an import; it ends with the test at the latest, as its standard input does."""
        with (self.folder / "job.log").open("ab") as log:
            process = subprocess.Popen(
                child_command(
                    [*self._inside, sys.executable, "-m", "treadle_registry.operations.job_process"]
                ),
                env=self.environment | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert process.stdin is not None
        process.stdin.write(encode_job(self.store.root, ImportJob(source, validate_only)))
        process.stdin.flush()
        return RunningImport(process)

    def run(self, source: HubSource, *, validate_only: bool = False, **environment: str) -> Imported:
        """An import from its start to its end."""
        running = self.start(source, validate_only=validate_only, **environment)
        try:
            return running.result()
        finally:
            running.kill()

    def partial_bytes(self) -> int:
        """What has come of files that are not whole."""
        return sum(path.stat().st_size for path in self.cache.glob("models--*/blobs/*.incomplete"))

    def blobs(self) -> list[Path]:
        """Everything that lies among the cache's blobs, whole or not."""
        return sorted(self.cache.glob("models--*/blobs/*"))
