"""`treadle demo` as a user runs it: what it prints, and that it leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from treadle.process import child_command

COMMAND = [sys.executable, "-m", "treadle.cli.main", "demo", "--port", "0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first demo imports the model for the others."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TREADLE_")}
    return clean | {"TREADLE_HOME": str(home)}


def test_the_demo_ends_with_its_figures(home, environment):
    result = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    *shown, last = result.stdout.splitlines()
    figures = json.loads(last)
    assert set(figures) == {
        "model_digest",
        "prompt_tokens",
        "output_tokens",
        "ttft_ms",
        "tokens_per_second",
        "text",
    }
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", figures["model_digest"])
    assert min(figures[name] for name in figures if name not in ("model_digest", "text")) > 0
    assert figures["text"] in "\n".join(shown)
    assert len(figures["text"]) > 40
    assert result.stderr.count(" tokens  ") == 8
    assert "import smollm2" in result.stderr
    print(last)
    assert not (home / "run" / "addresses.json").exists()


@pytest.fixture
def answering_demo(home: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A demo that has begun to answer."""
    with subprocess.Popen(
        child_command(COMMAND), env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"> "):
            assert process.poll() is None
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_nothing_is_left_behind(answering_demo, number, code):
    below = psutil.Process(answering_demo.pid).children(recursive=True)
    names = " ".join(" ".join(process.cmdline()) for process in below)
    assert all(
        f"treadle_{name}" in names for name in ("gateway", "registry", "tokenizer", "trainer", "worker")
    )
    assert "valkey-server" in names
    answering_demo.send_signal(number)
    assert answering_demo.wait(60) == code
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
    print(f"{len(below)} processes, none left")
    assert len(below) >= 7
