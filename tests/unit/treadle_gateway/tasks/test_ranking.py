"""Rerank: by a head over pairs, or by embeddings; the query is never cut."""

from __future__ import annotations

import struct

import pytest

from treadle.errors import Internal, InvalidArgument
from treadle_gateway.tasks import ranking
from treadle_gateway.tasks.task import RerankTask
from treadle_gateway.tasks.work import EmbedWork, RankWork

TASK = RerankTask(query="what is", documents=("this one", "that"))
HEAD = {"tasks": ("classify", "rerank"), "labels": ("LABEL_0",)}
VECTORS = {"tasks": ("embed", "rerank"), "embedding_dimensions": 8}


async def test_a_head_reads_query_and_document_together(plan):
    made = await plan(ranking, TASK, **HEAD, rank_activation="sigmoid")
    assert made.work == RankWork("sigmoid")
    assert [list(one.ids) for one in made.inputs] == [[1, 14, 12, 2, 14, 13, 2], [1, 14, 12, 2, 14, 2]]
    assert [list(one.type_ids) for one in made.inputs] == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    raw = RerankTask(query="what", documents=("this",), raw_scores=True)
    assert (await plan(ranking, raw, **HEAD, rank_activation="sigmoid")).work == RankWork("")


async def test_the_document_is_cut_and_never_the_query(plan):
    task = RerankTask(query="what is", documents=("word " * 40, "that"), truncate=True)
    first, second = (await plan(ranking, task, **HEAD)).inputs
    assert len(first.ids) == 20
    assert list(first.ids[:4]) == [1, 14, 12, 2]
    assert len(second.ids) == 6
    with pytest.raises(InvalidArgument, match=r"documents\[0\]: has 45 tokens, .* at most 20"):
        await plan(ranking, RerankTask(query="what is", documents=("word " * 40,)), **HEAD)


@pytest.mark.parametrize("facts", [HEAD, VECTORS], ids=["head", "vectors"])
@pytest.mark.parametrize("truncate", [False, True])
async def test_a_query_that_leaves_no_room_is_refused(plan, facts, truncate):
    task = RerankTask(query="word " * 30, documents=("this",), truncate=truncate)
    with pytest.raises(InvalidArgument, match=r"query: .* never cut") as caught:
        await plan(ranking, task, **facts)
    assert [one.field for one in caught.value.fields] == ["query"]


async def test_a_query_that_leaves_room_for_special_tokens_alone_is_refused(plan):
    exactly = RerankTask(query="word " * 17, documents=("this",), truncate=True)
    with pytest.raises(InvalidArgument, match="query: "):
        await plan(ranking, exactly, **HEAD)
    just = RerankTask(query="word " * 16, documents=("this that",), truncate=True)
    assert len((await plan(ranking, just, **HEAD)).inputs[0].ids) == 20


@pytest.mark.parametrize(
    ("facts", "normalize"),
    [({}, True), ({"similarity": "dot"}, False), ({"similarity": "dot", "normalize": True}, True)],
)
async def test_embeddings_are_compared_as_the_folder_says(plan, facts, normalize):
    made = await plan(ranking, TASK, **VECTORS, **facts, pooling="cls")
    assert made.work == RankWork(embed=EmbedWork("cls", normalize))
    assert [list(one.ids) for one in made.inputs] == [[1, 14, 12, 2], [1, 14, 13, 2], [1, 14, 2]]


async def test_query_and_documents_have_prompts_of_their_own(plan):
    prompts = {"query": "find ", "passage": "here it is ", "other": "x "}
    made = await plan(ranking, TASK, **VECTORS, prompts=prompts, skip_prompt=True)
    assert [(list(one.ids), one.first) for one in made.inputs] == [
        ([1, 14, 14, 12, 2], 2),
        ([1, 14, 12, 12, 14, 13, 2], 4),
        ([1, 14, 12, 12, 14, 2], 4),
    ]
    made = await plan(ranking, TASK, **VECTORS, prompts={"other": "x "}, default_prompt_name="other")
    assert all(one.ids[1] == 11 for one in made.inputs)


async def test_documents_come_best_first_and_equal_ones_in_their_order(plan):
    task = RerankTask(query="q", documents=("a", "b", "c", "d"))
    made = await plan(ranking, task, **HEAD)
    data = struct.pack("<4f", 0.5, 2.0, 0.5, -1.0)
    assert made.read(data).documents == [(1, 2.0), (0, 0.5), (2, 0.5), (3, -1.0)]
    two = await plan(ranking, RerankTask(query="q", documents=task.documents, top_n=2), **HEAD)
    assert two.read(data).documents == [(1, 2.0), (0, 0.5)]
    for wrong in (b"", data[:-4], data + data):
        with pytest.raises(Internal):
            made.read(wrong)
