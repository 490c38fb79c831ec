"""The clients' tasks against the whole suite: Python, Node and the command, over a network that breaks."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest
from command import Command
from cutting_proxy import CuttingProxy
from node_project import NodeProject
from running_suite import Suite

from treadle.client import AsyncClient, Embeddings

ROOT = Path(__file__).resolve().parents[3]
LINES = (ROOT / "tests" / "data" / "shakespeare.txt").read_text().splitlines()
TEXTS = [f"{number}: {line}" for number, line in enumerate(line for line in LINES if line.strip())][:400]


def matrix(embeddings: Embeddings) -> np.ndarray:
    return np.frombuffer(embeddings.data, "<f4").reshape(embeddings.shape)


@pytest.fixture
def address(suite: Suite) -> str:
    return suite.addresses["gateway"]


@pytest.fixture
def command(suite: Suite, tmp_path: Path) -> Command:
    return Command(tmp_path / "home", suite.addresses["gateway"])


async def test_a_cut_stream_answers_everything_once(address):
    async with AsyncClient(address, model="minilm") as client:
        whole = np.concatenate(
            [matrix(await client.embed(TEXTS[at : at + 100])) for at in range(0, 400, 100)]
        )
    port = int(address.rpartition(":")[2])
    async with (
        CuttingProxy(port, [20_000, 60_000, 100_000]).running() as proxy,
        AsyncClient(f"127.0.0.1:{proxy.port}", model="minilm") as client,
    ):
        items = [item async for item in client.embed_stream(TEXTS, window=32)]
    streamed = np.concatenate([matrix(item.result()) for item in items])
    assert [item.index for item in items] == list(range(400))
    assert proxy.num_cut == 3
    worst = float(np.abs(whole - streamed).max())
    assert worst < 1e-5
    print(f"cut {proxy.num_cut} times, 400 of 400 answered once, {worst:.1e} from one request's")


async def test_the_command_over_a_file_with_bad_lines(command, tmp_path):
    lines = list(TEXTS)
    for place in (3, 77, 399):
        lines[place] = ""
    lines[200] = "word " * 3000
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    done = await command.run("embed", "--file", str(tmp_path / "lines.txt"), "--model", "minilm", check=False)
    assert done.returncode == 1
    assert [row["index"] for row in done.rows] == list(range(400))
    failed = [row["index"] for row in done.rows if "error" in row]
    assert failed == [3, 77, 200, 399]
    assert "tokens" in done.rows[200]["error"]["message"]
    assert all(math.hypot(*row["embedding"]) == pytest.approx(1, abs=1e-5) for row in done.rows[:3])
    assert "400 lines, 4 failed" in done.stderr
    print(done.stderr.strip())


async def test_every_command_has_an_answer(command):
    for arguments in [
        ["classify", "a b", "--model", "moods"],
        ["tag", "a b", "--model", "entities", "--include-outside"],
        ["rerank", "a", "b", "a", "--model", "ranker"],
        ["score", "hello", "--context", "a", "--model", "tiny"],
    ]:
        (row,) = (await command.run(*arguments)).rows
        assert any(row.get(name) for name in ("labels", "spans", "documents", "num_tokens")), row
    refused = await command.run("classify", "a", "--model", "minilm", check=False)
    assert refused.returncode == 1
    assert "TASK_NOT_SUPPORTED" in refused.stderr
    assert "embed" in refused.stderr
    pooling = await command.run("embed", "a", "--model", "minilm", "--pooling", "last", check=False)
    assert pooling.returncode == 1, pooling.stdout
    assert "pooling" in pooling.stderr


async def test_evaluations_through_the_suite(command, suite, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS[:40]))
    tokenizer = suite.addresses["tokenizer"]
    arguments = ["--model", "tiny", "--tokenizer", tokenizer, "--json"]
    text = str(tmp_path / "text.txt")
    (wide,) = (await command.run("eval", "perplexity", text, "--window", "64", *arguments)).rows
    (narrow,) = (await command.run("eval", "perplexity", text, "--window", "16", *arguments)).rows
    assert wide["tokens"] == narrow["tokens"] > 100
    assert 1 < wide["perplexity"] < math.inf
    questions = ROOT / "examples" / "data" / "common_knowledge.jsonl"
    (found,) = (
        await command.run("eval", "multiple-choice", str(questions), "--model", "tiny", "--json")
    ).rows
    assert (found["count"], found["failed"]) == (20, 0)
    print(f"{wide['tokens']} tokens, perplexity {wide['perplexity']:.1f}; accuracy {found['accuracy']:.2f}")


async def test_node_gets_the_same_vectors(address):
    node = NodeProject.installed(ROOT / "examples" / "node")
    requests = [{"context": {"model": "minilm"}, "inputs": [{"text": text}]} for text in [*TEXTS[:60], ""]]
    port = int(address.rpartition(":")[2])
    async with CuttingProxy(port, [30_000]).running() as proxy:
        ran = await asyncio.to_thread(
            node.run,
            ROOT / "tests" / "foreign" / "asks.js",
            ["tasks", json.dumps({"method": "EmbedStream", "requests": requests, "window": 8})],
            {"TREADLE_ADDRESS": f"127.0.0.1:{proxy.port}"},
        )
    assert ran.returncode == 0, ran.stderr
    assert [said["index"] for said in ran.values] == list(range(61))
    assert ran.values[60]["error"]["fields"][0]["field"] == "inputs[0].text"
    assert proxy.num_cut == 1
    async with AsyncClient(address, model="minilm") as client:
        expected = matrix(await client.embed(TEXTS[:60]))
    worst = float(np.abs(np.array([said["rows"][0] for said in ran.values[:60]]) - expected).max())
    assert worst < 1e-5
    print(f"60 vectors in Node, one cut, {worst:.1e} from Python's")
