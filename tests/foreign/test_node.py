"""A client in Node: @grpc/grpc-js and protos/, none of the suite's own code."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cutting_proxy import CuttingProxy
from node_project import NodeProject, Ran
from running_suite import Suite

from treadle.client import AsyncClient
from treadle.errors import Cancelled

ASKS = Path(__file__).with_name("asks.js")

Ask = Callable[..., list[Any]]


@pytest.fixture
def ask(node: NodeProject, suite: Suite) -> Ask:
    """What the example client makes of a command: `ask("stream", generation={...})`."""

    def run(command: str, *, environment: dict[str, str] | None = None, **argument: object) -> list[Any]:
        address = {"TREADLE_ADDRESS": suite.addresses["gateway"]}
        ran = node.run(ASKS, [command, json.dumps(argument)], address | (environment or {}))
        assert ran.returncode == 0, ran.stderr
        return ran.values

    return run


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(suite.addresses["gateway"], model="smollm2") as client:
        yield client


def generation(tokens: int, **fields: object) -> dict[str, object]:
    """As JavaScript names the fields."""
    stopping = {"maxNewTokens": tokens, "ignoreEos": True}
    prompt = {} if "chat" in fields else {"text": "Weaving is the craft of"}
    return {"model": "smollm2", "sampling": {"temperature": 0}, "stopping": stopping} | prompt | fields


def detached() -> dict[str, object]:
    return {"disconnect": {"mode": "DISCONNECT_MODE_DETACH"}, "requestId": f"node-{uuid.uuid4().hex}"}


def answer_of(chunks: list[dict[str, Any]]) -> tuple[list[int], str]:
    """The ids and the text; every index comes once, in order, and the end says as many."""
    assert chunks[0]["chunk"] == "started"
    assert chunks[-1]["chunk"] == "finished"
    assert len({chunk["cursor"] for chunk in chunks}) == len(chunks)
    ids: list[int] = []
    for chunk in chunks[1:-1]:
        assert chunk["chunk"] == "tokens"
        assert chunk["tokens"]["index"] == len(ids)
        ids += chunk["tokens"]["tokenIds"]
    assert chunks[-1]["finished"]["usage"]["outputTokens"] == len(ids)
    return ids, "".join(chunk["tokens"]["text"] for chunk in chunks[1:-1])


async def test_node_and_python_get_the_same_answer(ask: Ask, client: AsyncClient):
    prompt = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    expected = await client.generate("Weaving is the craft of", **prompt)
    chunks = await asyncio.to_thread(ask, "stream", generation=generation(24))
    ids, text = answer_of(chunks)
    assert ids == list(expected.token_ids)
    assert text == expected.text
    assert chunks[0]["started"]["artifactDigest"] == expected.prompt.model_digest
    (whole,) = await asyncio.to_thread(ask, "generate", generation=generation(24))
    assert whole["choices"][0]["text"] == text
    assert whole["choices"][0]["finishReason"] == "FINISH_REASON_LENGTH"
    print(f"{len(ids)} tokens in {len(chunks) - 2} chunks: {text!r}")


async def test_a_chat_with_a_seed_can_be_asked_again(ask: Ask, client: AsyncClient):
    chat = {"messages": [{"role": "user", "content": "Name a colour."}]}
    asked = generation(12, chat=chat, sampling={"temperature": 1.0})
    chunks = await asyncio.to_thread(ask, "stream", generation=asked)
    # JavaScript's numbers hold it: 53 bits at most.
    seed = chunks[0]["started"]["seed"]
    again = await client.generate(
        messages=[{"role": "user", "content": "Name a colour."}],
        temperature=1.0,
        seed=seed,
        max_new_tokens=12,
        ignore_eos=True,
    )
    assert again.text == answer_of(chunks)[1]


def test_an_error_names_its_field_and_reason(ask: Ask):
    asked = generation(4, sampling={"topP": 2})
    for command in ("stream", "generate"):
        (said,) = ask(command, generation=asked)
        error = said["error"]
        assert error["code"] == "INVALID_ARGUMENT"
        assert error["reason"] == "INVALID_FIELD"
        assert [field["field"] for field in error["fields"]] == ["generation.sampling.top_p"]
        assert error["fromSuite"]
    (said,) = ask("generate", generation=generation(4, model="nobody"))
    assert (said["error"]["code"], said["error"]["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")


@pytest.mark.parametrize("how", ["signal", "leaving"])
async def test_a_client_that_goes_away_cancels(ask: Ask, client: AsyncClient, suite: Suite, how: str):
    request_id = f"node-{uuid.uuid4().hex}"
    asked = generation(2000, requestId=request_id)
    cut = {"abortAfter": 3} if how == "signal" else {"leaveAfter": 3}
    chunks = await asyncio.to_thread(ask, "stream", generation=asked, **cut)
    if how == "signal":
        assert chunks.pop()["error"]["code"] == "CANCELLED"
    assert 3 <= len(chunks) < 100
    with pytest.raises(Cancelled):
        await asyncio.wait_for(client.attach(request_id).collect(), 10)
    said = [line for line in suite.log("gateway") if line.get("request_id") == request_id]
    assert any("cancelled" in str(line["message"]) for line in said), said


async def test_cancel_by_id_from_another_process(ask: Ask, client: AsyncClient):
    asked = generation(2000, **detached())
    (*chunks,) = await asyncio.to_thread(ask, "stream", generation=asked, leaveAfter=2)
    assert len(chunks) == 2
    assert await asyncio.to_thread(ask, "cancel", requestId=asked["requestId"]) == [True]
    assert await asyncio.to_thread(ask, "cancel", requestId=asked["requestId"]) == [False]
    with pytest.raises(Cancelled):
        await client.attach(str(asked["requestId"])).collect()


async def test_a_stream_outlives_its_connections(ask: Ask, suite: Suite):
    whole = answer_of(await asyncio.to_thread(ask, "stream", generation=generation(40)))
    port = int(suite.addresses["gateway"].rpartition(":")[2])
    # Each cut comes after the connection's own first frames, and some chunks.
    async with CuttingProxy(port, [900, 900, 900]).running() as proxy:
        environment = {"TREADLE_ADDRESS": f"127.0.0.1:{proxy.port}"}
        asked = generation(40, **detached())
        chunks = await asyncio.to_thread(ask, "stream", generation=asked, environment=environment)
    assert answer_of(chunks) == whole
    assert proxy.num_cut == 3
    print(f"cut {proxy.num_cut} times, {len(chunks)} chunks, {len(whole[0])} tokens")


async def test_a_detached_answer_is_picked_up_by_another_process(ask: Ask, client: AsyncClient):
    asked = generation(24, **detached())
    begun = await asyncio.to_thread(ask, "stream", generation=asked, leaveAfter=5)
    assert len(begun) == 5
    rest = await asyncio.to_thread(ask, "attach", requestId=asked["requestId"], cursor=begun[-1]["cursor"])
    ids, text = answer_of(begun + rest)
    assert len(ids) == 24
    # And by a client of another language, from the beginning.
    answer = await client.attach(str(asked["requestId"])).collect()
    assert (list(answer.token_ids), answer.text) == (ids, text)


def test_a_batch_answers_each_and_fails_alone(ask: Ask):
    asked = [generation(1 + number % 5, requestId=f"b{number}-{uuid.uuid4().hex}") for number in range(20)]
    asked[7]["sampling"] = {"temperature": -1}
    outcomes = {said["index"]: said for said in ask("batch", generations=asked)}
    assert sorted(outcomes) == list(range(20))
    assert [field["field"] for field in outcomes[7]["error"]["fields"]] == ["generation.sampling.temperature"]
    for number, said in outcomes.items():
        if number != 7:
            assert len(said["response"]["choices"][0]["tokenIds"]) == 1 + number % 5


def test_reflection_is_all_that_node_needs(ask: Ask, suite: Suite):
    wanted = {"model": "smollm2", "text": "Hello", "stopping": {"max_new_tokens": 3, "ignore_eos": True}}
    asked = [
        ["treadle.api.inference.v1.InferenceService", "Generate", {"generation": wanted}],
        ["treadle.api.inference.v1.InferenceService", "ListModels", {}],
        ["grpc.health.v1.Health", "Check", {"service": ""}],
    ]
    services, answer, models, health = ask("reflected", calls=asked)
    assert "treadle.api.inference.v1.InferenceService" in services
    assert answer["usage"]["output_tokens"] == len(answer["choices"][0]["token_ids"]) == 3
    assert [model["model"] for model in models["models"]] == ["smollm2"]
    assert health["status"] == "SERVING"
    # long-running operations and statuses are Google's files: they come by reflection, too
    registry = {"TREADLE_ADDRESS": suite.addresses["registry"]}
    operations = ["google.longrunning.Operations", "ListOperations", {}]
    services, listed = ask("reflected", calls=[operations], environment=registry)
    assert "google.longrunning.Operations" in services
    assert listed["operations"]
    assert {operation["done"] for operation in listed["operations"]} == {True}


def test_the_programs_do_what_their_readme_says(example: Callable[..., Ran], suite: Suite):
    chat = example("chat.js", "--tokens", "24", "What", "is", "a", "loom?")
    assert chat.returncode == 0, chat.stderr
    assert re.search(r"\w.*\nFINISH_REASON_(LENGTH|STOP_TOKEN), \d+ tokens made", chat.stdout, re.DOTALL)

    begun = example("chat.js", "--tokens", "24", "--detach", "What", "is", "a", "loom?")
    request_id, cursor = begun.stderr.split("--attach ")[1].split()
    rest = example("chat.js", "--attach", request_id, cursor)
    assert begun.stdout + rest.stdout == chat.stdout

    wrong = example("chat.js", "--tokens", "0")
    assert wrong.returncode == 1
    assert "generation.stopping.max_new_tokens" in wrong.stderr

    batch = example("batch.js")
    assert len(batch.stdout.splitlines()) == 6
    assert "yellow   INVALID_ARGUMENT: generation.sampling.top_p" in batch.stdout

    healthy = example("health.js")
    assert healthy.returncode == 0
    assert healthy.stdout.split() == ["readiness", "SERVING", "liveness", "SERVING"]
    nobody = example("health.js", TREADLE_ADDRESS="127.0.0.1:1")
    assert nobody.returncode == 1
    assert nobody.stderr.startswith("UNAVAILABLE")

    reflected = example("reflect.js")
    assert "/treadle.api.inference.v1.InferenceService/BatchGenerate" in reflected.stdout
