"""What keeps a service from starting is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("service", "variables", "words"),
    [
        ("gateway", {"TREADLE_GATEWAY_LANE_LIMIT": "0"}, ["TREADLE_GATEWAY_LANE_LIMIT", "greater than"]),
        ("trainer", {"TREADLE_TLS_CERTIFICATE": "c.pem"}, ["TREADLE_TLS_PRIVATE_KEY go together"]),
        ("trainer", {"TREADLE_TRAINER_ADDRESS": "0.0.0.0:0"}, ["0.0.0.0:0", "TREADLE_KEYS_FILE"]),
        ("trainer", {"TREADLE_KEYS_FILE": "/nowhere/keys.json"}, ["/nowhere/keys.json", "No such file"]),
        ("worker", {"TREADLE_ENGINE_BLOCK_SIZE": "3"}, ["TREADLE_ENGINE_BLOCK_SIZE", "multiple of 16"]),
    ],
)
def test_the_reason_is_one_line_and_the_exit_code_1(service, variables, words):
    result = subprocess.run(
        [sys.executable, "-m", f"treadle_{service}"],
        env=os.environ | {f"TREADLE_{service.upper()}_ADDRESS": "127.0.0.1:0"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("treadle_")]
    assert all(word in line for word in words), line
    assert "Traceback" not in result.stderr
