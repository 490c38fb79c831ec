"""The five tasks over real gRPC and a real Valkey: what is asked of the worker, and what the client gets."""

from __future__ import annotations

import struct

import pytest

from treadle.api.inference.v1 import inference_pb2

pytestmark = pytest.mark.usefixtures("models")
KINDS = ["Embed", "Classify", "Tag", "Rerank", "Score"]


async def test_embed(stub, worker, request_of):
    request = request_of("Embed", inputs=[{"text": text} for text in ("ab", "c", "def")], dimensions=2)
    answer = await stub.Embed(request, timeout=10)
    assert (list(answer.embeddings.shape), answer.embeddings.dtype) == ([3, 2], "F32")
    assert struct.unpack("<6f", answer.embeddings.data) == (0, 1, 1, 2, 2, 3)
    assert (answer.artifact_digest, answer.profile) == ("sha256:vectors", "p-vectors")
    assert answer.prompt_tokens == (2 + 1 + 3) + 3 * 2
    (entry,) = worker.taken
    assert entry.task.embed.pooling == "mean"
    assert entry.task.embed.normalize
    assert [list(one.token_ids) for one in entry.task.inputs] == [
        [1, 101, 102, 3],
        [1, 103, 3],
        [1, 104, 105, 106, 3],
    ]
    assert (entry.version, entry.model_name, entry.tenant) == (2, "vectors", "default")
    assert 0 < entry.timeout_ms <= 11_000
    assert entry.retention_ms == 60_000


async def test_classify(stub, worker, request_of):
    request = request_of("Classify", inputs=[{"text": "a", "pair": "b"}, {"text": "c"}], top_k=2)
    answer = await stub.Classify(request, timeout=10)
    rows = [[(one.label, one.score) for one in row.labels] for row in answer.classifications]
    assert rows == [[("so-so", 0.5), ("bad", 0.25)]] * 2
    (entry,) = worker.taken
    assert entry.task.classify.activation == "softmax"
    assert list(entry.task.inputs[0].type_ids) == [0, 0, 0, 1, 1]
    assert not entry.task.inputs[1].type_ids


async def test_tag(stub, worker, request_of):
    answer = await stub.Tag(request_of("Tag", inputs=[{"text": "ab c"}]), timeout=10)
    spans = [(one.start, one.end, one.label, one.score) for one in answer.texts[0].spans]
    assert spans == [(at, at + 1, "X", 0.5) for at in range(4)]
    first = request_of("Tag", inputs=[{"text": "ab c"}], aggregation=inference_pb2.AGGREGATION_FIRST)
    answer = await stub.Tag(first, timeout=10)
    assert [(one.start, one.end) for one in answer.texts[0].spans] == [(0, 3), (3, 4)]
    assert worker.taken[0].task.HasField("tag")


async def test_rerank_by_a_head_and_by_embeddings(stub, worker, request_of):
    answer = await stub.Rerank(request_of("Rerank", top_n=2), timeout=10)
    assert [(one.index, one.score) for one in answer.documents] == [(2, 2.0), (1, 1.0)]
    by_vectors = request_of("Rerank", context={"model": "vectors"})
    answer = await stub.Rerank(by_vectors, timeout=10)
    assert [(one.index, one.score) for one in answer.documents] == [(2, 3.0), (1, 2.0), (0, 1.0)]
    head, vectors = (entry.task for entry in worker.taken)
    assert (head.rank.activation, head.rank.HasField("embed"), len(head.inputs)) == ("sigmoid", False, 3)
    assert (vectors.rank.embed.pooling, vectors.rank.embed.normalize, len(vectors.inputs)) == (
        "mean",
        True,
        4,
    )
    assert bytes(one - 4 for one in vectors.inputs[0].token_ids[1:-1]) == b"q: what"
    assert bytes(one - 4 for one in vectors.inputs[1].token_ids[1:-1]) == b"d: this"


async def test_score(stub, worker, request_of):
    request = request_of(
        "Score",
        inputs=[
            {"context": "a ", "continuation": "bc"},
            {"continuation": "d"},
            {"context_token_ids": {"ids": [5]}, "continuation_token_ids": {"ids": [6, 7]}},
        ],
    )
    answer = await stub.Score(request, timeout=10)
    assert [list(one.token_ids) for one in answer.scores] == [[36, 102, 103], [104], [6, 7]]
    assert [list(one.logprobs) for one in answer.scores] == [[-0.5] * 3, [-0.5], [-0.5] * 2]
    assert [(one.total_logprob, one.greedy) for one in answer.scores] == [
        (-1.5, True),
        (-0.5, True),
        (-1.0, True),
    ]
    (entry,) = worker.taken
    assert [one.first for one in entry.task.inputs] == [1, 1, 1]
    # "tiny" has no token that texts begin with, but one at their end.
    assert list(entry.task.inputs[1].token_ids) == [2, 104]
    assert answer.prompt_tokens == 4 + 2 + 3


@pytest.mark.parametrize("kind", KINDS)
async def test_a_repeated_call_gets_the_first_ones_answer(
    stub, worker, fake_registry, redis, request_of, failure, kind
):
    call = getattr(stub, kind)
    first = await call(request_of(kind, "again"), timeout=10)
    # Whatever has become of the workers since.
    keys = [key async for key in redis.scan_iter("treadle:worker*")]
    await redis.delete(*keys)
    for _ in range(3):
        assert await call(request_of(kind, "again"), timeout=10) == first
    assert len(worker.taken) == 1
    changed = request_of(kind, "again", context={"profile": "p-tiny"})
    error = await failure(call(changed, timeout=10))
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "REQUEST_ID_TAKEN")
    print(f"{kind}: 4 calls, {len(worker.taken)} computed")


async def test_a_result_of_another_model_is_read_with_that_models_labels(
    stub, worker, fake_registry, request_of
):
    """The alias moves between a call and its repetition."""
    first = await stub.Classify(request_of("Classify", "moved"), timeout=10)
    moved = fake_registry.others["judge"]
    fake_registry.others["sorter"] = moved
    assert await stub.Classify(request_of("Classify", "moved"), timeout=10) == first
    assert first.artifact_digest == "sha256:sorter"
    assert len(worker.taken) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_two_tasks_with_one_id_are_two_payloads(stub, request_of, failure, kind):
    await getattr(stub, kind)(request_of(kind, "taken"), timeout=10)
    for other in KINDS:
        if other != kind:
            error = await failure(getattr(stub, other)(request_of(other, "taken"), timeout=10))
            assert error.reason == "REQUEST_ID_TAKEN"


async def test_a_task_has_no_stream_to_attach_to(stub, worker, request_of, generation, failure, read):
    await stub.Embed(request_of("Embed", "task"), timeout=10)
    attach = stub.Attach(inference_pb2.AttachRequest(request_id="task"), timeout=10)
    error = await failure(read(attach))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TASK_HAS_NO_STREAM")
    asked = inference_pb2.GenerateRequest(generation=generation("task"))
    assert (await failure(stub.Generate(asked, timeout=10))).reason == "REQUEST_ID_TAKEN"
    await stub.Generate(inference_pb2.GenerateRequest(generation=generation("text", 1)), timeout=10)
    score = request_of("Score", "text")
    assert (await failure(stub.Score(score, timeout=10))).reason == "REQUEST_ID_TAKEN"


async def test_what_each_model_can_do_is_listed(stub):
    listed = (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)).models
    found = {
        one.model: (list(one.tasks), list(one.labels), one.embedding_dimensions, list(one.prompt_names))
        for one in listed
    }
    assert found == {
        "judge": (["classify", "rerank"], ["LABEL_0"], 0, []),
        "sorter": (["classify"], ["bad", "so-so", "good"], 0, []),
        "tagger": (["tag"], ["O", "B-X", "I-X"], 0, []),
        "tiny": (["generate", "score"], [], 0, []),
        "vectors": (["embed", "rerank"], [], 4, ["document", "query"]),
    }


async def test_a_thousand_sentences_in_four_calls(stub, worker, fake_tokenizer, request_of):
    sentences = [f"sentence {number}" for number in range(1000)]
    rows = []
    for at in range(0, 1000, 250):
        inputs = [{"text": text} for text in sentences[at : at + 250]]
        answer = await stub.Embed(request_of("Embed", inputs=inputs), timeout=30)
        rows += struct.iter_unpack("<4f", answer.embeddings.data)
    assert len(rows) == 1000
    assert fake_tokenizer.calls == 4
    assert [len(entry.task.inputs) for entry in worker.taken] == [250] * 4
    print(
        f"{len(rows)} sentences, {fake_tokenizer.calls} calls of the tokenizer, {len(worker.taken)} entries"
    )
