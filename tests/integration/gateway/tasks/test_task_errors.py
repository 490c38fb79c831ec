"""What a client is told when something is wrong with its task, and that the next one is served."""

from __future__ import annotations

import asyncio
import struct

import grpc
import pytest

from treadle.api.inference.v1 import inference_pb2
from treadle.api.worker.v1.queue_pb2 import TaskResult, Terminal
from treadle.errors import Unavailable
from treadle.rpc import to_status

pytestmark = pytest.mark.usefixtures("models")
KINDS = ["Embed", "Classify", "Tag", "Rerank", "Score"]
LONG = "x" * 100_000

BAD = [
    ("Embed", {"inputs": []}, "inputs"),
    ("Embed", {"inputs": [{"text": "a"}, {"text": ""}]}, "inputs[1].text"),
    ("Embed", {"inputs": [{"text": "a", "pair": "b"}]}, "inputs[0].pair"),
    ("Embed", {"inputs": [{"text": "a"}] * 257}, "inputs"),
    ("Embed", {"inputs": [{"text": "a"}, {"text": LONG}]}, "inputs[1].text"),
    ("Embed", {"inputs": [{"text": "a"}, {"text": "bad text"}]}, "inputs[1].text"),
    ("Embed", {"dimensions": 5}, "dimensions"),
    ("Embed", {"dimensions": 0}, "dimensions"),
    ("Embed", {"prompt_name": "nobody"}, "prompt_name"),
    ("Embed", {"pooling": 7}, "pooling"),
    ("Classify", {"inputs": [{"text": "a", "pair": ""}]}, "inputs[0].pair"),
    ("Classify", {"inputs": [{"text": "a", "pair": "bad text"}]}, "inputs[0].pair"),
    ("Classify", {"inputs": [{"text": "a", "pair": LONG}]}, "inputs[0]"),
    ("Classify", {"top_k": 0}, "top_k"),
    ("Tag", {"inputs": [{"text": LONG}]}, "inputs[0].text"),
    ("Tag", {"aggregation": 9}, "aggregation"),
    ("Rerank", {"query": ""}, "query"),
    ("Rerank", {"query": LONG}, "query"),
    ("Rerank", {"query": LONG, "truncate": True}, "query"),
    ("Rerank", {"query": "x" * 61, "truncate": True}, "query"),
    ("Rerank", {"query": "bad text"}, "query"),
    ("Rerank", {"documents": []}, "documents"),
    ("Rerank", {"documents": ["a", ""]}, "documents[1]"),
    ("Rerank", {"documents": ["a", "bad text"]}, "documents[1]"),
    ("Rerank", {"documents": ["a", LONG]}, "documents[1]"),
    ("Rerank", {"documents": ["a"] * 257}, "documents"),
    ("Rerank", {"context": {"model": "vectors"}, "documents": ["a", "bad text"]}, "documents[1]"),
    ("Rerank", {"context": {"model": "vectors"}, "query": LONG, "truncate": True}, "query"),
    ("Score", {"inputs": [{"context": "a"}]}, "inputs[0].continuation"),
    ("Score", {"inputs": [{"context": "a", "continuation": "bad text"}]}, "inputs[0].continuation"),
    ("Score", {"inputs": [{"context": "bad text", "continuation": "b"}]}, "inputs[0].context"),
    ("Score", {"inputs": [{"context": LONG, "continuation": "b"}]}, "inputs[0]"),
    (
        "Score",
        {"inputs": [{"continuation_token_ids": {"ids": [1, 300]}}]},
        "inputs[0].continuation_token_ids.ids[1]",
    ),
    ("Embed", {"context": {"model": ""}}, "context.model"),
    ("Tag", {"context": {"request_id": "{x}"}}, "context.request_id"),
]


@pytest.mark.parametrize(("kind", "change", "field"), BAD)
async def test_a_bad_input_is_named_and_the_next_one_served(
    stub, worker, request_of, failure, kind, change, field
):
    error = await failure(getattr(stub, kind)(request_of(kind, **change), timeout=10))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert [one.field for one in error.fields] == [field]
    await getattr(stub, kind)(request_of(kind), timeout=10)
    assert len(worker.taken) == 1


@pytest.mark.parametrize(
    ("kind", "change", "code", "reason", "field"),
    [
        ("Embed", {"context": {"model": "nobody"}}, "NOT_FOUND", "MODEL_NOT_FOUND", "context.model"),
        ("Embed", {"context": {"model": "asleep"}}, "UNAVAILABLE", "MODEL_NOT_SERVED", None),
        (
            "Embed",
            {"context": {"profile": "p-other"}},
            "FAILED_PRECONDITION",
            "PROFILE_NOT_SERVED",
            "context.profile",
        ),
        ("Embed", {"context": {"adapter": "a"}}, "UNIMPLEMENTED", "UNIMPLEMENTED", "context.adapter"),
        (
            "Embed",
            {"pooling": inference_pb2.POOLING_LAST},
            "FAILED_PRECONDITION",
            "POOLING_NOT_AVAILABLE",
            "pooling",
        ),
        (
            "Score",
            {"inputs": [{"continuation_token_ids": {"ids": [1], "tokenizer_digest": "sha256:x"}}]},
            "FAILED_PRECONDITION",
            "TOKENIZER_MISMATCH",
            "inputs[0].continuation_token_ids.tokenizer_digest",
        ),
    ],
)
async def test_what_cannot_be_now_is_said(
    stub, worker, request_of, failure, kind, change, code, reason, field
):
    error = await failure(getattr(stub, kind)(request_of(kind, **change), timeout=10))
    assert (error.code, error.reason) == (code, reason)
    assert [one.field for one in error.fields] == ([field] if field else [])
    assert not worker.taken


async def test_a_task_that_the_model_has_no_head_for(stub, worker, request_of, generation, failure):
    able = {
        "vectors": ("Embed", "Rerank"),
        "sorter": ("Classify",),
        "judge": ("Classify", "Rerank"),
        "tagger": ("Tag",),
        "tiny": ("Score",),
    }
    refused = 0
    for model, kinds in able.items():
        for kind in set(KINDS) - set(kinds):
            error = await failure(getattr(stub, kind)(request_of(kind, context={"model": model}), timeout=10))
            assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TASK_NOT_SUPPORTED")
            assert [one.field for one in error.fields] == ["context.model"]
            assert all(name in error.metadata["tasks"] for name in map(str.lower, kinds))
            refused += 1
        if model != "tiny":
            asked = inference_pb2.GenerateRequest(generation=generation(model=model))
            error = await failure(stub.Generate(asked, timeout=10))
            assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TASK_NOT_SUPPORTED")
            assert [one.field for one in error.fields] == ["generation.model"]
            refused += 1
    assert not worker.taken
    assert refused == 22
    print(f"{refused} refused, each naming what the model can do")


async def test_too_many_tokens_in_all(start_gateway, connect_to, worker, request_of, failure):
    stub = await connect_to(await start_gateway(max_task_tokens=100))
    for kind, change, field in (
        ("Embed", {"inputs": [{"text": "x" * 50}] * 2}, "inputs"),
        ("Rerank", {"documents": ["x" * 40] * 3}, "documents"),
        ("Score", {"inputs": [{"continuation_token_ids": {"ids": [5] * 60}}] * 2}, "inputs"),
    ):
        error = await failure(getattr(stub, kind)(request_of(kind, **change), timeout=10))
        assert ([one.field for one in error.fields], "100" in error.message) == ([field], True)
    assert not worker.taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"", b"\0", bytes(4), bytes(4000), struct.pack("<If", 9, 0.5) * 40])
async def test_a_result_of_another_size_is_internal_and_no_crash(
    stub, worker, request_of, failure, kind, data
):
    model = {"Embed": "vectors", "Classify": "sorter", "Tag": "tagger", "Rerank": "judge", "Score": "tiny"}[
        kind
    ]
    digest = "sha256:artifact" if model == "tiny" else f"sha256:{model}"
    worker.task_ends["odd"] = Terminal(
        task_result=TaskResult(data=data, artifact_digest=digest, profile=f"p-{model}")
    )
    for _ in range(2):
        error = await failure(getattr(stub, kind)(request_of(kind, "odd"), timeout=10))
        assert (error.code, error.reason) == ("INTERNAL", "RESULT_MALFORMED")
    await getattr(stub, kind)(request_of(kind), timeout=10)
    assert len(worker.taken) == 2


async def test_how_the_worker_ends_a_task_is_how_the_call_ends(stub, worker, request_of, failure):
    away = Unavailable("the engine is gone", reason="ENGINE_DIED", retry_after_s=1.0)
    worker.task_ends["dead"] = Terminal(error=to_status(away))
    error = await failure(stub.Embed(request_of("Embed", "dead"), timeout=10))
    assert (error.code, error.reason, error.retry_after_s) == ("UNAVAILABLE", "ENGINE_DIED", 1.0)
    worker.task_ends["other"] = Terminal(finished={})
    assert (await failure(stub.Embed(request_of("Embed", "other"), timeout=10))).code == "INTERNAL"


async def test_a_deadline_ends_the_call_and_the_work(stub, gateway, worker, request_of, failure, eventually):
    worker.hold("late")
    late = request_of("Embed", "late", context={"timeout": {"nanos": 300_000_000}})
    assert (await failure(stub.Embed(late, timeout=10))).code == "DEADLINE_EXCEEDED"
    assert len(worker.taken) == 1
    await eventually(lambda: gateway.admission.held == len(gateway.background) == 0, "nothing is held")
    worker.hold("late").release()
    await eventually(lambda: worker.fenced == ["late"], "the worker is told")


async def test_a_client_that_leaves_cancels(stub, gateway, worker, request_of, eventually):
    for number in range(5):
        worker.hold(f"left{number}")
    calls = [stub.Embed(request_of("Embed", f"left{number}"), timeout=60) for number in range(5)]
    waiting = [asyncio.ensure_future(_ended(call)) for call in calls]
    await eventually(lambda: len(worker.taken) == 5, "all run")
    for call in calls:
        call.cancel()
    await asyncio.gather(*waiting)
    await eventually(
        lambda: gateway.admission.held == len(gateway.follower) == len(gateway.background) == 0,
        "nothing is held",
    )
    for number in range(5):
        worker.hold(f"left{number}").release()
    await eventually(lambda: len(worker.fenced) == 5, "all are dropped")
    print(f"{len(worker.fenced)} of 5 cancelled")


async def _ended(call) -> None:
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await call


async def test_one_of_two_clients_of_a_task_may_leave(stub, gateway, worker, request_of, eventually):
    worker.hold("shared")
    calls = [stub.Embed(request_of("Embed", "shared"), timeout=60) for _ in range(2)]
    waiting = [asyncio.ensure_future(_ended(calls[0])), asyncio.ensure_future(_answered(calls[1]))]
    await eventually(lambda: len(gateway.follower) == 2, "both follow")
    await eventually(lambda: len(worker.taken) == 1, "one runs")
    calls[0].cancel()
    await waiting[0]
    await eventually(lambda: len(gateway.follower) == 1, "one is gone")
    worker.hold("shared").release()
    assert (await waiting[1]).embeddings.shape[0] == 2
    assert len(worker.taken) == 1


async def _answered(call):
    return await call


async def test_an_admission_is_a_slot_a_task(
    start_gateway, connect_to, worker, request_of, failure, eventually
):
    gateway = await start_gateway(max_concurrent_requests=2)
    stub = await connect_to(gateway)
    calls = []
    for number in range(2):
        worker.hold(f"held{number}")
        calls.append(stub.Embed(request_of("Embed", f"held{number}"), timeout=20))
    waiting = [asyncio.ensure_future(_answered(call)) for call in calls]
    await eventually(lambda: gateway.admission.held == 2, "two are held")
    error = await failure(stub.Embed(request_of("Embed"), timeout=10))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "GATEWAY_FULL")
    for number in range(2):
        worker.hold(f"held{number}").release()
    await asyncio.gather(*waiting)
    assert gateway.admission.held == 0
