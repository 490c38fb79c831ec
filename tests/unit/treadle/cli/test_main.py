"""The command where no suite runs: help, errors, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treadle import __version__
from treadle.cli.console import show_error
from treadle.errors import FieldViolation, InvalidArgument, ResourceExhausted


def treadle(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TREADLE_")}
    return subprocess.run(
        [sys.executable, "-m", "treadle.cli.main", *arguments],
        env=clean | {"TREADLE_HOME": str(home), "COLUMNS": "100"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "command",
    [
        *["demo", "up", "status", "chat", "generate", "models import", "models rm", "embed", "classify"],
        *["tag", "rerank", "score", "eval perplexity", "eval multiple-choice"],
    ],
)
def test_every_command_explains_itself(tmp_path, command):
    result = treadle(tmp_path, *command.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert f"treadle {command}" in result.stdout
    assert "--help" in result.stdout
    assert len(result.stdout.splitlines()) > 8


def test_version(tmp_path):
    assert treadle(tmp_path, "--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "reason", "way_out"),
    [
        (["generate", "x", "--address", "127.0.0.1:1"], "UNAVAILABLE", "treadle up"),
        (["chat", "-m", "x", "--address", "nonsense"], "INVALID_FIELD", "host:port"),
        (["models", "import", "/nowhere", "--registry", "127.0.0.1:1"], "INVALID_FIELD", ".gguf"),
        (["up", "--model", "=x"], "INVALID_FIELD", "alias=source"),
        (["up", "--redis-url", "redis://:secret@127.0.0.1:1/0"], "NO_REDIS", "127.0.0.1:1"),
    ],
)
def test_errors_are_one_clear_message(tmp_path, arguments, reason, way_out, monkeypatch):
    result = treadle(tmp_path, *arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert reason in result.stderr
    assert way_out in result.stderr
    assert "Traceback" not in result.stderr
    assert "secret" not in result.stderr


def test_a_wrong_call_exits_2(tmp_path):
    result = treadle(tmp_path, "generte")
    assert result.returncode == 2
    assert "generate" in result.stderr


def test_status_of_nothing(tmp_path):
    result = treadle(tmp_path, "status", "--address", "127.0.0.1:1")
    assert result.returncode == 1
    assert "gateway" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_taken_home_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    result = treadle(tmp_path / "file", "up")
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_names_reason_fields_and_time(capsys):
    fields = [FieldViolation("a.b", "must be 1"), FieldViolation("c", "must be 2")]
    show_error(InvalidArgument("two fields are wrong", reason="SOME_REASON", fields=fields))
    show_error(ResourceExhausted("full [of] it", retry_after_s=1.5))
    printed = capsys.readouterr().err
    for text in (
        "two fields are wrong",
        "SOME_REASON",
        "a.b: must be 1",
        "c: must be 2",
        "in 1.5 s",
        "full [of] it",
    ):
        assert text in printed
