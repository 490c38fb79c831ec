"""An engine as a process of its own environment, asked by `engines/protocol.py`'s JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from harness import models
from harness.places import BENCHMARKS, MODELS, environment, python

Name = Literal["treadle", "vllm", "llamacpp", "transformers"]
_EXIT_S = 30.0


class EngineFailed(Exception):
    """An engine that did not load, or ended; the message is its own."""


@dataclass(frozen=True)
class Generation:
    """What a call took; see `engines/protocol.py`."""

    wall_s: float
    first_token_s: list[float | None]
    last_token_s: list[float | None]
    output_tokens: list[int]

    @property
    def output_per_s(self) -> float:
        """Output tokens of all prompts over the call's time."""
        return sum(self.output_tokens) / self.wall_s

    @property
    def decode_per_s(self) -> float:
        """Tokens after the first over the time since the first, of a call of one prompt."""
        first, last = self.first_token_s[0], self.last_token_s[0]
        assert first is not None, "the engine tells no token's time"
        assert last is not None
        return (self.output_tokens[0] - 1) / (last - first)


def log_of(name: str) -> Path:
    """Where a process writes what it has to say beside its answers."""
    log = MODELS / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def spawn(name: Name, command: Sequence[str], log: Path, *, is_heard: bool = True) -> subprocess.Popen[str]:
    """Starts an engine or a server in a group of its own; not `is_heard`: what it prints goes to its log."""
    with log.open("w") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if is_heard else errors,
            stderr=errors,
            text=True,
            cwd=BENCHMARKS,
            env=os.environ | engine_environment(name),
            start_new_session=True,
        )


class EngineProcess:
    """A loaded engine. Between its calls it is stopped (SIGSTOP): a thread that spins takes nobody's core."""

    def __init__(self, name: Name, dtype: str = "bf16", *, options: Sequence[str] = ()) -> None:
        """Loads; raises MissingPeer without an environment, EngineFailed where it does not load."""
        self.label = f"{name} {dtype}"
        interpreter = Path(sys.executable) if name == "treadle" else python(name)
        model = models.gguf() if name == "llamacpp" else models.folder()
        self._log = log_of(f"{name}-{dtype}")
        command = [
            str(interpreter),
            *("-m", f"engines.{name}_engine"),
            *("--model", str(model), "--dtype", dtype, *options),
        ]
        self._process = spawn(name, command, self._log)
        try:
            self.ready: dict[str, Any] = self._hear()["ready"]
            self._signal(signal.SIGSTOP)
        except BaseException:
            self._kill()
            raise

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        mode: Literal["batch", "one"] = "batch",
        *,
        pause_s: float = 0.0,
    ) -> Generation:
        """One call, greedy and past the end of text; raises EngineFailed."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        call = {
            "prompts": [list(ids) for ids in prompts],
            "max_new_tokens": max_new_tokens,
            "mode": mode,
            "pause_s": pause_s,
        }
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(call), file=self._process.stdin, flush=True)
        answer = self._hear()
        self._signal(signal.SIGSTOP)
        return Generation(**answer)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)
        self._kill()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended; its log is {self._log}"}
        if "error" in answer:
            raise EngineFailed(f"{self.label}: {answer['error']}")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


def engine_environment(name: Name) -> dict[str, str]:
    """The variables that an engine is best run with, by its own documentation; raises MissingPeer."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name == "treadle":
        from treadle_worker.engine_client import OPENMP_SPINS

        return {"GOMP_SPINCOUNT": OPENMP_SPINS}
    if name == "vllm":
        openmp = environment("vllm") / "lib" / "libiomp5.so"
        return quiet | {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(MODELS / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "LD_PRELOAD": str(openmp) if openmp.exists() else "",
        }
    return quiet


@contextlib.contextmanager
def engines(*wanted: tuple[Name, str], options: Sequence[str] = ()) -> Iterator[list[EngineProcess]]:
    """Several engines, loaded one after another."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(EngineProcess(name, dtype, options=options)) for name, dtype in wanted]
