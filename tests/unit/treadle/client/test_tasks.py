"""Tasks of the client, against a gateway that answers by rule, over a network that breaks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from cutting_proxy import CuttingProxy
from fake_inference import FakeInference, FakeTokenizer, logprob_of, positive, serving, vector_of

from treadle.client import (
    AsyncClient,
    Client,
    EmbedRequest,
    RerankRequest,
    ScoreInput,
    ScoreRequest,
    TokenizerClient,
)
from treadle.errors import Cancelled, FailedPrecondition, InvalidArgument, Unavailable

TEXTS = ["A loom", "weaves cloth", "Émile sings", "🧵 and thread"]


@pytest.fixture
async def inference() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def address(inference: FakeInference) -> AsyncIterator[str]:
    async with serving(inference) as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address, model="minilm") as client:
        yield client


async def test_each_task_answers_its_request(client):
    embeddings = await client.embed(TEXTS)
    assert embeddings.shape == (len(TEXTS), 8)
    assert [list(row) for row in embeddings.rows] == [vector_of(text) for text in TEXTS]
    assert (embeddings.model_digest, embeddings.profile, embeddings.prompt_tokens) == (
        "sha256:minilm",
        "p",
        9,
    )
    cut = await client.embed("A loom", dimensions=3)
    assert [list(row) for row in cut.rows] == [vector_of("A loom")[:3]]

    classified = await client.classify([*TEXTS, ("one", "two")], model="sst")
    assert [{one.label: one.score for one in labels}["POSITIVE"] for labels in classified.labels] == [
        pytest.approx(positive(text)) for text in [*TEXTS, "onetwo"]
    ]
    assert all(labels[0].score >= labels[1].score for labels in classified.labels)
    best = await client.classify("A loom", model="sst", top_k=1)
    assert len(best.labels[0]) == 1

    tagged = await client.tag(["in Rome and 🧵 Oslo"], model="ner")
    assert ["in Rome and 🧵 Oslo"[span.start : span.end] for span in tagged.spans[0]] == ["Rome", "Oslo"]

    ranking = await client.rerank("red blue", ["green", "red", "blue red"], top_n=2)
    assert [(one.index, one.score) for one in ranking.documents] == [(2, 2.0), (1, 1.0)]

    scores = await client.score([("a", "bc"), ScoreInput([5], [6, 7], "sha256:bytes")], model="gpt")
    assert scores.scores[0].token_ids == tuple(b"bc")
    assert scores.scores[0].logprobs == (logprob_of(97, 98), logprob_of(98, 99))
    assert scores.scores[1].total_logprob == logprob_of(5, 6) + logprob_of(6, 7)


async def test_errors_name_field_and_reason(client):
    with pytest.raises(InvalidArgument) as refused:
        await client.embed(["good", ""])
    assert refused.value.fields[0].field == "inputs[1].text"
    with pytest.raises(FailedPrecondition, match="rerank") as unable:
        await client.classify("x")
    assert unable.value.reason == "TASK_NOT_SUPPORTED"
    wrong = [
        client.embed("x", pooling="sum"),
        client.embed("x", dimensions=-1),
        client.embed(["half \udc80 a character"]),
        client.embed([("one", "two", "three")]),
        client.tag("x", aggregation="most"),
        client.classify("x", priority="urgent"),
        client.rerank("x", "one text"),
        client.score(["text"]),
        client.score([([1 << 40], [1])]),
    ]
    for call in wrong:
        with pytest.raises(InvalidArgument):
            await call
    print(f"{len(wrong)} requests that no message can say")


async def test_streams_answer_in_order_and_items_fail_alone(client, inference, rng):
    texts = [rng.choice(["good", "BAD", "", "half \udc80"]) + f" {n}" * rng.randint(0, 2) for n in range(300)]

    async def source():
        for text in texts:
            await asyncio.sleep(0)
            yield text

    items = [item async for item in client.embed_stream(source(), window=7)]
    assert [item.index for item in items] == list(range(300))
    good = 0
    for text, item in zip(texts, items, strict=True):
        if "good" in text or (text.strip() and text[0] not in "Bh"):
            assert list(item.result().rows[0]) == vector_of(text)
            good += 1
        else:
            assert isinstance(item.error, InvalidArgument)
    never_sent = sum("\udc80" in text for text in texts)
    assert sum(inference.computed.values()) == 300 - never_sent
    assert 0 < never_sent < 300 - good
    print(f"{good} answered, {300 - good} failed alone, {never_sent} of them were never sent")


async def test_each_kind_streams(client):
    classified = [item.result().labels[0] async for item in client.classify_stream(TEXTS, model="sst")]
    tagged = [item.result().spans[0] async for item in client.tag_stream(["Rome", "x"], model="ner")]
    requests = [RerankRequest(query="a", documents=["b", "a"]) for _ in range(3)]
    ranked = [item.result().documents[0].index async for item in client.rerank_stream(requests)]
    scored = [
        item.result().scores
        async for item in client.score_stream(
            [("a", "b"), ScoreRequest(inputs=[("a", "b")] * 2)], model="gpt"
        )
        if item.error is None
    ]
    assert (len(classified), [len(spans) for spans in tagged], ranked) == (4, [1, 0], [1, 1, 1])
    assert [len(scores) for scores in scored] == [1]  # a request has its own options: no model that scores
    whole = [EmbedRequest(texts=TEXTS), EmbedRequest(texts=TEXTS[:1], dimensions=2)]
    shapes = [item.result().shape async for item in client.embed_stream(whole)]
    assert shapes == [(4, 8), (1, 2)]


async def test_only_unanswered_items_are_asked_again(client, inference, rng):
    inference.losses = [rng.randint(0, 20) for _ in range(8)]
    # The first call is lost before it drains: one request at least is cancelled with its call.
    inference.drains = [1000, *(rng.choice([2, 10, 1000]) for _ in range(7)), 5, 3]
    texts = [f"text {number}" for number in range(200)]
    items = [item async for item in client.embed_stream(texts, window=16)]
    assert [list(item.result().rows[0]) for item in items] == [vector_of(text) for text in texts]
    assert inference.num_calls == 11
    assert not inference.drains
    again = sum(inference.computed.values()) - 200
    # What a lost call read and did not answer is cancelled, and asked again under another id.
    assert inference.cancelled
    assert 0 <= again <= 16 * 10
    print(f"10 calls lost or told to go elsewhere, 200 answered once, {again} computed again")


async def test_a_request_that_was_cancelled_with_its_call_is_asked_again(client, inference):
    inference.num_lost = 2
    assert list((await client.embed("x", request_id="mine")).rows[0]) == vector_of("x")
    assert (inference.cancelled, inference.num_lost) == ({"mine"}, 0)
    with pytest.raises(Cancelled):  # somebody's will, where no call was lost
        await client.embed("x", request_id="mine")


async def test_a_cut_connection_loses_and_doubles_nothing(address, inference, rng):
    texts = [f"text {number}" for number in range(400)]
    port = int(address.rpartition(":")[2])
    async with (
        CuttingProxy(port, [rng.randint(1000, 6000) for _ in range(4)]).running() as proxy,
        AsyncClient(f"127.0.0.1:{proxy.port}", model="minilm") as client,
    ):
        items = [item async for item in client.embed_stream(texts, window=32)]
    assert [item.index for item in items] == list(range(400))
    assert [list(item.result().rows[0]) for item in items] == [vector_of(text) for text in texts]
    again = sum(inference.computed.values()) - 400
    assert proxy.num_cut >= 2
    assert len(inference.computed) == 400
    assert again <= 32 * proxy.num_cut
    print(f"cut {proxy.num_cut} times, {again} asked again under their ids, 400 of 400 answered once")


async def test_a_gateway_that_stays_away_is_an_error(address, inference):
    inference.losses = [0] * 50
    async with AsyncClient(address, model="minilm", reconnects=2) as client:
        with pytest.raises(Unavailable) as caught:
            [item async for item in client.embed_stream(["x"])]
    assert caught.value.reason == "DRAINING"
    assert inference.num_calls == 3


async def test_a_failing_source_ends_its_stream(client):
    def source():
        yield "one"
        raise ZeroDivisionError

    answered = 0
    with pytest.raises(ZeroDivisionError):
        async for item in client.embed_stream(source()):
            answered += item.error is None
    assert answered == 1
    assert [item async for item in client.embed_stream([])] == []
    only_bad = [item async for item in client.embed_stream(["\udc80"] * 3, window=1)]
    assert [item.index for item in only_bad] == [0, 1, 2]


async def test_a_local_failure_is_told_before_the_next_request_is_there(client):
    told = asyncio.Event()

    async def source():
        yield "\udc80"
        await told.wait()
        yield "good"

    async with asyncio.timeout(10):
        items = []
        async for item in client.embed_stream(source()):
            items.append(item)
            told.set()
    assert [item.error is None for item in items] == [False, True]


async def test_the_same_without_an_event_loop(address):
    def use():
        with Client(address, model="minilm") as client:
            rows = client.embed(TEXTS).rows
            streamed = [list(item.result().rows[0]) for item in client.embed_stream(TEXTS)]
            labels = client.classify("x", model="sst").labels
            classified = [item.result().labels[0] for item in client.classify_stream(["x"], model="sst")]
            spans = client.tag("Rome", model="ner").spans
            tagged = [item.result().spans[0] for item in client.tag_stream(["Rome"], model="ner")]
            ranked = client.rerank("a", ["b", "a"]).documents
            request = RerankRequest(query="a", documents=["b", "a"])
            ranked_too = [item.result().documents for item in client.rerank_stream([request])]
            scores = client.score([("a", "b")], model="gpt").scores
            scored = [item.result().scores[0] for item in client.score_stream([("a", "b")], model="gpt")]
            first = next(client.embed_stream(f"{n}" for n in range(10_000)))
            return [
                ([list(row) for row in rows], streamed),
                (list(labels), classified),
                (list(spans), tagged),
                ([ranked], ranked_too),
                (list(scores), scored),
            ], first

    pairs, first = await asyncio.to_thread(use)
    assert all(whole == streamed for whole, streamed in pairs)
    assert first.index == 0


@pytest.mark.parametrize("reconnecting", [False, True])
async def test_a_stream_is_fed_by_another_one_of_the_same_client(address, inference, reconnecting):
    inference.losses = [7, 3] if reconnecting else []

    def ask() -> list[int]:
        with Client(address, model="minilm") as client:
            texts = (f"text {number}" for number in range(100))
            again = (f"again {item.index}" for item in client.embed_stream(texts, window=8))
            return [item.index for item in client.embed_stream(again, window=8) if item.error is None]

    async with asyncio.timeout(60):
        assert await asyncio.to_thread(ask) == list(range(100))
    # Each loss costs a call that is told what was cancelled with it, and one that asks it anew.
    assert inference.num_calls == (6 if reconnecting else 2)


async def test_ctrl_c_while_a_streams_source_waits(address):
    script = (
        "import sys, treadle\n"
        "with treadle.Client(sys.argv[1], model='minilm') as client:\n"
        "    for item in client.embed_stream(open(sys.argv[2])):\n"
        "        print(item.index, flush=True)\n"
    )
    read, write = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, address, f"/dev/fd/{read}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=[read],
    )
    os.close(read)
    os.write(write, b"one\n")
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"0\n"
        process.send_signal(signal.SIGINT)
        _, said = await process.communicate()
    os.close(write)
    assert said.strip().endswith(b"KeyboardInterrupt"), said.decode()


@pytest.mark.parametrize("source", ["one text", 7])
async def test_what_is_no_source_is_an_error(address, source):
    def ask() -> None:
        with Client(address, model="minilm") as client:
            list(client.embed_stream(source))

    async with asyncio.timeout(60):
        with pytest.raises((InvalidArgument, TypeError)):
            await asyncio.to_thread(ask)


async def test_a_tokenizer_gives_ids_and_text():
    async with (
        serving(FakeInference(), FakeTokenizer()) as address,
        TokenizerClient(address) as tokenizer,
    ):
        encoded = await tokenizer.encode(["ab", "c"], model="gpt")
        assert encoded.token_ids == ((256, 97, 98), (256, 99))
        assert encoded.tokenizer_digest == "sha256:bytes"
        plain = await tokenizer.encode(["ab"], model="gpt", add_special_tokens=False)
        assert await tokenizer.decode(plain.token_ids, model="gpt") == ("ab",)
