"""sentence-transformers as a process of its own environment, stopped (SIGSTOP) between its calls."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from harness.engine import EngineFailed, log_of
from harness.places import BENCHMARKS, python

_EXIT_S = 30.0


class SentenceTransformers:
    """A loaded model."""

    def __init__(self, process: subprocess.Popen[str], out: Path) -> None:
        self._process = process
        self._out = out
        self.version: str = self._hear()["ready"]["version"]
        self._signal(signal.SIGSTOP)

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, float]:
        """Float32 [sentences, dimensions], and the seconds that it took; raises EngineFailed."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        call = {"sentences": list(sentences), "out": str(self._out)}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(call), file=self._process.stdin, flush=True)
        took = self._hear()["wall_s"]
        self._signal(signal.SIGSTOP)
        return np.fromfile(self._out, "<f4").reshape(len(sentences), -1), took

    def _hear(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"sentence-transformers ended; its log is {log_of('sentence-transformers')}")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ends the process."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def sentence_transformers(model: Path) -> Iterator[SentenceTransformers]:
    """A loaded model of a folder; raises MissingPeer without its environment, EngineFailed."""
    command = [str(python("sentence-transformers")), "-m", "engines.sentence_transformers_engine"]
    with tempfile.TemporaryDirectory() as folder, log_of("sentence-transformers").open("w") as errors:
        process = subprocess.Popen(
            [*command, "--model", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=BENCHMARKS,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
            start_new_session=True,
        )
        peer = SentenceTransformers(process, Path(folder) / "rows")
        try:
            yield peer
        finally:
            peer.close()
