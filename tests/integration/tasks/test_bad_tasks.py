"""Every bad task at the front door: its status, its field, the way out, and every model still answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import pytest
from google.protobuf.message import Message

from treadle.api.inference.v1 import inference_pb2 as pb
from treadle.rpc import from_rpc_error

WORD = "word "


def asked(model: str, **fields: object) -> dict[str, object]:
    return {"context": {"model": model}} | fields


def texts(*given: str) -> list[dict[str, str]]:
    return [{"text": text} for text in given]


@dataclass(frozen=True)
class Bad:
    """A request, and what must be said of it."""

    method: str
    fields: dict[str, object] = field(repr=False)
    code: str
    field: str = ""
    words: str = ""
    """Part of the way out."""
    reason: str = ""


def invalid(method: str, fields: dict[str, object], field: str, words: str) -> Bad:
    return Bad(method, fields, "INVALID_ARGUMENT", field, words)


def cannot(method: str, model: str, *able: str) -> Bad:
    body = {
        "Score": {"inputs": [{"context": "a", "continuation": "b"}]},
        "Rerank": {"query": "a", "documents": ["b"]},
    }
    fields = asked(model, **body.get(method, {"inputs": texts("a text")}))
    return Bad(method, fields, "FAILED_PRECONDITION", "", ", ".join(able), "TASK_NOT_SUPPORTED")


BAD: dict[str, Bad] = {
    "no inputs": invalid("Embed", asked("minilm"), "inputs", "1 to"),
    "an empty string": invalid("Embed", asked("minilm", inputs=texts("a", "")), "inputs[1].text", "empty"),
    "an empty string to classify": invalid(
        "Classify", asked("moods", inputs=texts("")), "inputs[0].text", "empty"
    ),
    "an empty string to tag": invalid("Tag", asked("entities", inputs=texts("")), "inputs[0].text", "empty"),
    "an empty query": invalid("Rerank", asked("ranker", query="", documents=["a"]), "query", "empty"),
    "no documents": invalid("Rerank", asked("ranker", query="a"), "documents", "1 to"),
    "an empty document": invalid(
        "Rerank", asked("ranker", query="a", documents=["a", ""]), "documents[1]", "empty"
    ),
    "an empty continuation": invalid(
        "Score", asked("tiny", inputs=[{"context": "a"}]), "inputs[0].continuation", "empty"
    ),
    "100,000 tokens": invalid(
        "Embed", asked("minilm", inputs=texts("a", WORD * 100_000)), "inputs[1].text", "truncate"
    ),
    "100,000 tokens to classify": invalid(
        "Classify", asked("moods", inputs=texts(WORD * 100_000)), "inputs[0].text", "truncate"
    ),
    "100,000 tokens to score": invalid(
        "Score",
        asked("tiny", inputs=[{"context": "a", "continuation": WORD * 100_000}]),
        "inputs[0]",
        "at most",
    ),
    "a batch over the limit": invalid(
        "Embed", asked("minilm", inputs=texts(*["a"] * 5000)), "inputs", "1 to 256"
    ),
    "a pooling that the folder does not have": Bad(
        "Embed",
        asked("minilm", inputs=texts("a"), pooling=pb.POOLING_CLS),
        "FAILED_PRECONDITION",
        "pooling",
        "mean",
        "POOLING_NOT_AVAILABLE",
    ),
    "a pooling that is none": invalid("Embed", asked("minilm", inputs=texts("a"), pooling=77), "pooling", ""),
    "no dimensions": invalid(
        "Embed", asked("minilm", inputs=texts("a"), dimensions=0), "dimensions", "unset"
    ),
    "more dimensions than there are": invalid(
        "Embed", asked("minilm", inputs=texts("a"), dimensions=385), "dimensions", "384"
    ),
    "an unknown prompt": invalid(
        "Embed", asked("minilm", inputs=texts("a"), prompt_name="nobody"), "prompt_name", ""
    ),
    "a pair to embed": invalid(
        "Embed", asked("minilm", inputs=[{"text": "a", "pair": "b"}]), "inputs[0].pair", ""
    ),
    "a pair to tag": invalid(
        "Tag", asked("entities", inputs=[{"text": "a", "pair": "b"}]), "inputs[0].pair", ""
    ),
    "no best labels": invalid("Classify", asked("moods", inputs=texts("a"), top_k=0), "top_k", "unset"),
    "no best documents": invalid(
        "Rerank", asked("ranker", query="a", documents=["b"], top_n=0), "top_n", "unset"
    ),
    "ids past the vocabulary": invalid(
        "Score",
        asked(
            "tiny", inputs=[{"context_token_ids": {"ids": [1]}, "continuation_token_ids": {"ids": [1024]}}]
        ),
        "inputs[0].continuation_token_ids.ids[0]",
        "vocabulary",
    ),
    "both a text and ids": invalid(
        "Score",
        asked("tiny", inputs=[{"context": "a", "continuation": "b", "continuation_token_ids": {"ids": [1]}}]),
        "inputs[0].continuation",
        "",
    ),
    "no model": invalid("Embed", asked("", inputs=texts("a")), "context.model", "ListModels"),
    "an unknown model": Bad(
        "Embed", asked("nobody", inputs=texts("a")), "NOT_FOUND", "context.model", "ListModels"
    ),
    "a request_id with spaces": invalid(
        "Embed",
        {"context": {"model": "minilm", "request_id": "a b"}, "inputs": texts("a")},
        "context.request_id",
        "",
    ),
    "embed by a classifier": cannot("Embed", "moods", "classify"),
    "classify by an embedder": cannot("Classify", "minilm", "embed", "rerank"),
    "tag by a classifier": cannot("Tag", "moods", "classify"),
    "rerank by five labels": cannot("Rerank", "moods", "classify"),
    "score by an encoder": cannot("Score", "minilm", "embed", "rerank"),
    "embed by a decoder": cannot("Embed", "tiny", "generate", "score"),
}
GOOD = {
    "Embed": asked("minilm", inputs=texts("still there")),
    "Classify": asked("moods", inputs=texts("still there")),
    "Tag": asked("entities", inputs=texts("still there")),
    "Rerank": asked("ranker", query="still", documents=["there"]),
    "Score": asked("tiny", inputs=[{"context": "still", "continuation": " there"}]),
}


def request(method: str, fields: dict[str, object]) -> Message:
    made: Callable[..., Message] = getattr(pb, f"{method}Request")
    return made(**fields)


async def refused(stub, method: str, fields: dict[str, object]):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request(method, fields), timeout=30)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("name", BAD)
async def test_bad_tasks_name_their_field(stub, name):
    bad = BAD[name]
    error = await refused(stub, bad.method, bad.fields)
    assert error.code == bad.code, error.message
    if bad.reason:
        assert error.reason == bad.reason
    if bad.field:
        assert bad.field in [violation.field for violation in error.fields], error.message
    assert bad.words in error.message + " ".join(violation.description for violation in error.fields)
    assert len(error.message) < 1000
    assert await getattr(stub, bad.method)(request(bad.method, GOOD[bad.method]), timeout=30)


@pytest.mark.parametrize("method", GOOD)
async def test_bad_items_fail_alone_in_the_middle_of_a_stream(stub, method):
    of_method = [bad for bad in BAD.values() if bad.method == method]
    sent = [GOOD[method]]
    for bad in of_method:
        sent += [bad.fields, GOOD[method]]
    made = getattr(pb, f"{method}StreamRequest")

    async def items():
        for fields in sent:
            yield made(request=request(method, fields))

    answers = [answer async for answer in getattr(stub, f"{method}Stream")(items(), timeout=60)]
    assert [answer.index for answer in answers] == list(range(len(sent)))
    assert [answer.WhichOneof("outcome") for answer in answers] == ["response", "error"] * len(of_method) + [
        "response"
    ]
    codes = [grpc.StatusCode[bad.code].value[0] for bad in of_method]
    assert [answer.error.code for answer in answers if answer.HasField("error")] == codes
    print(f"{method}: {len(of_method)} bad items among {len(answers)}")
    assert of_method


async def test_what_is_too_long_can_be_cut(stub):
    long = WORD * 2000
    fields = asked("minilm", inputs=texts(long, "short"), truncate=True)
    answer = await stub.Embed(request("Embed", fields), timeout=30)
    assert list(answer.embeddings.shape) == [2, 384]
    assert answer.prompt_tokens < 300
    for method, cut in {
        "Classify": asked("moods", inputs=[{"text": long, "pair": "short"}], truncate=True),
        "Tag": asked("entities", inputs=texts(long), truncate=True),
        "Rerank": asked("ranker", query="short", documents=[long], truncate=True),
    }.items():
        assert (await getattr(stub, method)(request(method, cut), timeout=30)).prompt_tokens <= 128


async def test_a_deadline_holds(stub):
    fields = asked("minilm", inputs=texts(*[WORD * 200] * 128))
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Embed(request("Embed", fields), timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    print(f"ended after {time.monotonic() - began:.2f} s")
    assert await stub.Embed(request("Embed", GOOD["Embed"]), timeout=60)
