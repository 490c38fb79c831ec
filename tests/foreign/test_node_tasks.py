"""Tasks asked by the client in Node: ordered streams, vectors as Float32Array, a network that breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cutting_proxy import CuttingProxy
from fake_inference import FakeInference, positive, serving, vector_of
from node_project import NodeProject, Ran

ASKS = Path(__file__).with_name("asks.js")


@pytest.fixture
async def inference() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def address(inference: FakeInference) -> AsyncIterator[str]:
    async with serving(inference) as address:
        yield address


@pytest.fixture
def run(node: NodeProject, address: str) -> Callable[..., Any]:
    """A program of the example, or the tests' own, to its end, without holding up the gateway."""

    async def run(script: Path, *arguments: str, to: str = "") -> Ran:
        environment = {"TREADLE_ADDRESS": to or address}
        return await asyncio.to_thread(node.run, script, arguments, environment)

    return run


def requests(texts: list[str]) -> list[dict[str, Any]]:
    return [{"context": {"model": "minilm"}, "inputs": [{"text": text}]} for text in texts]


async def test_a_stream_is_ordered_and_items_fail_alone(run, rng):
    texts = [rng.choice(["good", "BAD"]) + f" {number}" for number in range(100)]
    asked = {"method": "EmbedStream", "requests": requests(texts), "window": 8}
    ran = await run(ASKS, "tasks", json.dumps(asked))
    assert ran.returncode == 0, ran.stderr
    assert [said["index"] for said in ran.values] == list(range(100))
    failed = 0
    for said, text in zip(ran.values, texts, strict=True):
        if "good" in text:
            assert said["rows"] == [vector_of(text)]  # float32 travels exactly
        else:
            failed += 1
            assert said["error"]["code"] == "INVALID_ARGUMENT"
            assert said["error"]["fields"][0]["field"] == "inputs[0].text"
    assert 0 < failed < 100
    print(f"{100 - failed} vectors in their order, {failed} failed alone")


async def test_only_unanswered_items_are_sent_again(run, inference, address):
    inference.losses = [5, 0, 17]
    texts = [f"text {number}" for number in range(300)]
    port = int(address.rpartition(":")[2])
    async with CuttingProxy(port, [4000, 4000]).running() as proxy:
        asked = {"method": "EmbedStream", "requests": requests(texts), "window": 16}
        ran = await run(ASKS, "tasks", json.dumps(asked), to=f"127.0.0.1:{proxy.port}")
    assert ran.returncode == 0, ran.stderr
    assert [said["rows"] for said in ran.values] == [[vector_of(text)] for text in texts]
    assert proxy.num_cut == 2
    assert not inference.losses
    assert inference.cancelled  # and asked again under other ids
    again = sum(inference.computed.values()) - 300
    assert again <= 16 * (proxy.num_cut + 6)
    print(f"lost 3 times, cut {proxy.num_cut} times; 300 of 300 once, {again} computed again")


async def test_a_source_that_fails_ends_the_stream(run):
    asked = {"method": "EmbedStream", "requests": requests(["a", "b", "c"]), "failAfter": 2}
    ran = await run(ASKS, "tasks", json.dumps(asked))
    assert ran.values[-1]["error"]["message"] == "the source failed"
    assert all("rows" in said for said in ran.values[:-1])


async def test_the_programs_do_what_their_readme_says(node: NodeProject, run):
    embedded = await run(node.folder / "embed.js", "Who weaves?")
    assert embedded.returncode == 0, embedded.stderr
    sentences = (node.folder.parent / "data" / "sentences.txt").read_text().splitlines()
    wanted = vector_of("Who weaves?")
    lines = embedded.stdout.splitlines()
    assert len(lines) == len(sentences) == 10
    for line, sentence in zip(lines, sentences, strict=True):
        near = sum(a * b for a, b in zip(wanted, vector_of(sentence), strict=True))
        assert float(line.split()[0]) == pytest.approx(near, abs=6e-4)
        assert line.endswith(sentence)
    classified = await run(node.folder / "classify.js", "one", "two")
    assert classified.returncode == 0, classified.stderr
    for line, text in zip(classified.stdout.splitlines(), ["one", "two"], strict=True):
        best = max(positive(text), 1 - positive(text))
        assert float(line.split("%")[0]) == pytest.approx(100 * best, abs=0.06)
    refused = await run(node.folder / "classify.js", "")
    assert refused.returncode == 1
    assert refused.stderr.startswith("INVALID_ARGUMENT")
