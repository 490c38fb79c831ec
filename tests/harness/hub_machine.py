"""A machine of its own that imports from a hub: a Hugging Face home, a store, and jobs in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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

    def __init__(self, folder: Path, hub: HubServer, **environment: str) -> None:
        self.home, self.folder = folder / "hf", folder
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
        process = subprocess.Popen(
            child_command([sys.executable, "-m", "treadle_registry.operations.job_process"]),
            env=self.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "job.log").open("ab"),
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
            assert running.process.stdin is not None
            assert running.process.stdout is not None
            running.process.stdin.close()
            running.process.stdout.close()

    def blobs(self) -> list[Path]:
        """Everything that lies among the cache's blobs, whole or not."""
        return sorted(self.cache.glob("models--*/blobs/*"))
