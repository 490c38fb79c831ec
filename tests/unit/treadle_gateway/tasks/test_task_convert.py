"""Messages to plain Python and back, and the entry of a lane."""

from __future__ import annotations

import struct
from array import array

import pytest

from treadle.api.inference.v1 import inference_pb2 as pb
from treadle.errors import PermissionDenied
from treadle.queue.keys import RequestKeys
from treadle.security import ANYBODY, Principal, Role
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.models import ServedModel
from treadle_gateway.tasks import convert
from treadle_gateway.tasks.task import ScoreInput, TaskContext, TextInput
from treadle_gateway.tasks.work import (
    Classifications,
    ClassifyWork,
    ContinuationScore,
    Embeddings,
    EmbedWork,
    Plan,
    Prepared,
    Ranking,
    RankWork,
    Scores,
    ScoreWork,
    Span,
    TaggedTexts,
    TagWork,
    TaskAnswer,
    WorkInput,
)

MODEL = ServedModel(Artifact("sha256:a", "sha256:c", "sha256:t", 0, 0, GenerationDefaults()), "p", 64, 300, 1)
CONVERSIONS = {
    pb.EmbedRequest: convert.to_embed,
    pb.ClassifyRequest: convert.to_classify,
    pb.TagRequest: convert.to_tag,
    pb.RerankRequest: convert.to_rerank,
    pb.ScoreRequest: convert.to_score,
}


def test_unset_is_none_and_zero_is_zero():
    unset, zero = (
        convert.to_embed(pb.EmbedRequest(), ANYBODY),
        convert.to_embed(pb.EmbedRequest(normalize=False, dimensions=0), ANYBODY),
    )
    assert (unset.normalize, unset.dimensions) == (None, None)
    assert (zero.normalize, zero.dimensions) == (False, 0)
    assert convert.to_classify(pb.ClassifyRequest(top_k=0), ANYBODY).top_k == 0
    assert convert.to_classify(pb.ClassifyRequest(), ANYBODY).multi_label is None
    assert convert.to_rerank(pb.RerankRequest(), ANYBODY).top_n is None
    pairs = pb.ClassifyRequest(inputs=[{"text": "a", "pair": ""}, {"text": "b"}])
    assert convert.to_classify(pairs, ANYBODY).inputs == (TextInput("a", ""), TextInput("b"))
    empty_ids = pb.ScoreRequest(inputs=[{"context_token_ids": {}}, {"context": "a"}])
    ids, text = convert.to_score(empty_ids, ANYBODY).inputs
    assert ids.context_ids is not None
    assert text == ScoreInput("a")


@pytest.mark.parametrize("kind", CONVERSIONS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_the_payload_is_all_but_the_id_and_the_time(kind):
    to_task = CONVERSIONS[kind]

    def digest(**context) -> str:
        return to_task(kind(context={"model": "m"} | context), ANYBODY).context.payload_digest

    base = digest()
    assert digest(request_id="x", timeout={"seconds": 3}) == digest(tenant="default") == base
    others = {digest(**one) for one in ({"model": "n"}, {"tenant": "t"}, {"priority": 3}, {"profile": "p"})}
    assert len(others | {base}) == 5
    every = {
        make(one(context={"model": "m"}), ANYBODY).context.payload_digest for one, make in CONVERSIONS.items()
    }
    assert len(every) == 5, "the bytes are the same, and the tasks are not"


def test_a_tenant_is_the_callers():
    caller = Principal("key", frozenset({Role.INFER}), tenants=frozenset({"mine"}))
    assert convert.to_tag(pb.TagRequest(), caller).context.tenant == "mine"
    with pytest.raises(PermissionDenied) as caught:
        convert.to_tag(pb.TagRequest(context={"tenant": "theirs"}), caller)
    assert [one.field for one in caught.value.fields] == ["context.tenant"]


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (EmbedWork("cls", True, 8), "embed"),
        (ClassifyWork("softmax"), "classify"),
        (TagWork(), "tag"),
        (RankWork(""), "rank"),
        (RankWork(embed=EmbedWork("mean", False)), "rank"),
        (ScoreWork(), "score"),
    ],
)
def test_the_entry_says_which_work_it_is(work, kind):
    plan = Plan([WorkInput([1, 2], first=1), WorkInput([3, 4], [0, 1])], work, lambda data: Ranking([]))
    task = convert.to_embed(pb.EmbedRequest(context={"model": "m"}), ANYBODY)
    entry = convert.to_lane_entry(
        task, RequestKeys("t", "r"), Prepared(MODEL, plan, 4), gateway_id="gw", timeout_ms=5
    )
    found = type(entry).FromString(entry.SerializeToString()).task
    assert found.WhichOneof("task") == kind
    assert [(list(one.token_ids), list(one.type_ids), one.first) for one in found.inputs] == [
        ([1, 2], [], 1),
        ([3, 4], [0, 1], 0),
    ]
    if isinstance(work, EmbedWork):
        assert (found.embed.pooling, found.embed.normalize, found.embed.dimensions) == ("cls", True, 8)
    if isinstance(work, RankWork):
        assert found.rank.HasField("embed") == (work.embed is not None)
    assert (entry.profile, entry.artifact_digest, entry.tokenizer_digest) == ("p", "sha256:a", "sha256:t")
    assert (entry.priority, entry.model_name, entry.timeout_ms) == (2, "m", 5)
    assert entry.payload_digest == task.context.payload_digest


def answer(outcome) -> TaskAnswer:
    return TaskAnswer("sha256:a", "p", 7, outcome)


def test_answers():
    data = struct.pack("<4f", 1, 2, 3, 4)
    embedded = convert.to_embed_response(answer(Embeddings(2, 2, data)))
    assert (list(embedded.embeddings.shape), embedded.embeddings.data) == ([2, 2], data)
    assert (embedded.artifact_digest, embedded.profile, embedded.prompt_tokens) == ("sha256:a", "p", 7)
    classified = convert.to_classify_response(answer(Classifications([[("x", 0.5)], []])))
    assert [len(one.labels) for one in classified.classifications] == [1, 0]
    tagged = convert.to_tag_response(answer(TaggedTexts([[Span(0, 3, "X", 0.5)], []])))
    assert [len(one.spans) for one in tagged.texts] == [1, 0]
    ranked = convert.to_rerank_response(answer(Ranking([(1, 0.5), (0, 0.25)])))
    assert [one.index for one in ranked.documents] == [1, 0]
    row = ContinuationScore([5, 6], array("f", [-0.5, -0.25]), greedy=True)
    (scored,) = convert.to_score_response(answer(Scores([row]))).scores
    assert (list(scored.token_ids), list(scored.logprobs)) == ([5, 6], [-0.5, -0.25])
    assert (scored.total_logprob, scored.greedy) == (-0.75, True)


def test_a_context_is_read_whole():
    message = pb.TagRequest(
        context={
            "request_id": "r",
            "tenant": "t",
            "model": "m",
            "profile": "p",
            "adapter": "a",
            "priority": 3,
            "timeout": {"seconds": 1, "nanos": 500_000_000},
        }
    )
    context = convert.to_tag(message, ANYBODY).context
    digest = context.payload_digest
    assert context == TaskContext("r", "t", "m", "p", "a", 3, 1.5, digest)
