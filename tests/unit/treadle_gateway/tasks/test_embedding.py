"""Embed: what the client says, else the folder, else the documented default; and what cannot be."""

from __future__ import annotations

import struct

import pytest

from treadle.errors import FailedPrecondition, Internal, InvalidArgument
from treadle_gateway.tasks import embedding
from treadle_gateway.tasks.task import EmbedTask, Pooling, TextInput
from treadle_gateway.tasks.work import EmbedWork

TWO = (TextInput("one two"), TextInput("three"))
FACTS = {"tasks": ("embed", "rerank"), "embedding_dimensions": 8}
PROMPTS = {"query": "find this ", "passage": "here is "}


@pytest.mark.parametrize(
    ("change", "facts", "work"),
    [
        ({}, {}, EmbedWork("mean", False, 0)),
        ({}, {"pooling": "cls", "normalize": True}, EmbedWork("cls", True, 0)),
        ({"pooling": Pooling.LAST}, {}, EmbedWork("last", False, 0)),
        ({"pooling": Pooling.CLS}, {"pooling": "cls"}, EmbedWork("cls", False, 0)),
        ({"normalize": False}, {"normalize": True}, EmbedWork("mean", False, 0)),
        ({"normalize": True, "dimensions": 3}, {}, EmbedWork("mean", True, 3)),
        ({"dimensions": 8}, {}, EmbedWork("mean", False, 0)),
    ],
)
async def test_the_clients_word_goes_before_the_folders(plan, change, facts, work):
    made = await plan(embedding, EmbedTask(inputs=TWO, **change), **FACTS | facts)
    assert made.work == work
    assert [list(one.ids) for one in made.inputs] == [[1, 13, 13, 2], [1, 15, 2]]
    assert all(not one.type_ids and not one.first for one in made.inputs)
    rows = made.read(bytes(4 * 2 * (work.dimensions or 8)))
    assert (rows.rows, rows.dimensions) == (2, work.dimensions or 8)


async def test_a_pooling_that_the_folder_has_not(plan):
    with pytest.raises(FailedPrecondition) as caught:
        await plan(embedding, EmbedTask(inputs=TWO, pooling=Pooling.LAST), **FACTS, pooling="cls")
    assert caught.value.reason == "POOLING_NOT_AVAILABLE"
    assert [one.field for one in caught.value.fields] == ["pooling"]
    assert "cls" in caught.value.message
    assert caught.value.metadata == {"pooling": "cls"}


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"dimensions": 9}, "dimensions", "1 to 8"),
        ({"prompt_name": "nobody"}, "prompt_name", "passage, query"),
    ],
)
async def test_what_the_model_has_not_is_named(plan, change, field, said):
    with pytest.raises(InvalidArgument) as caught:
        await plan(embedding, EmbedTask(inputs=TWO, **change), **FACTS, prompts=PROMPTS)
    assert [one.field for one in caught.value.fields] == [field]
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("name", "facts", "ids", "first"),
    [
        ("", {}, [1, 15, 2], 0),
        ("query", {}, [1, 14, 14, 15, 2], 0),
        ("", {"default_prompt_name": "query"}, [1, 14, 14, 15, 2], 0),
        ("passage", {"default_prompt_name": "query"}, [1, 14, 12, 15, 2], 0),
        # The leading special token and the prompt's two words.
        ("query", {"skip_prompt": True}, [1, 14, 14, 15, 2], 3),
        ("", {"skip_prompt": True}, [1, 15, 2], 0),
    ],
)
async def test_prompts_stand_before_each_text(plan, tokenizer, name, facts, ids, first):
    task = EmbedTask(inputs=(TextInput("three"),), prompt_name=name)
    made = await plan(embedding, task, **FACTS, prompts=PROMPTS, **facts)
    assert [(list(one.ids), one.first) for one in made.inputs] == [(ids, first)]
    assert len(tokenizer.asked) == 1


async def test_too_long_is_refused_with_count_and_limit_or_cut(plan, tokenizer):
    long = TextInput("word " * 30)
    with pytest.raises(InvalidArgument, match=r"inputs\[1\].text: has 32 tokens.* at most 20; .*truncate"):
        await plan(embedding, EmbedTask(inputs=(TextInput("a"), long)), **FACTS)
    with pytest.raises(InvalidArgument, match="at most 12"):
        await plan(embedding, EmbedTask(inputs=(long,)), **FACTS, max_input_tokens=12)
    made = await plan(embedding, EmbedTask(inputs=(long,), truncate=True), **FACTS, max_input_tokens=12)
    assert len(made.inputs[0].ids) == 12
    assert tokenizer.asked[-1][1].cut.max_length == 12


async def test_a_prompt_that_takes_it_all_leaves_nothing_to_pool(plan):
    task = EmbedTask(inputs=(TextInput("a"),), prompt_name="long", truncate=True)
    with pytest.raises(InvalidArgument, match="no token of its own"):
        await plan(
            embedding, task, **FACTS, prompts={"long": "word " * 40}, skip_prompt=True, max_model_len=6
        )


async def test_a_text_without_tokens_and_ids_beyond_the_vocabulary(plan, tokenizer):
    with pytest.raises(InvalidArgument, match=r"inputs\[0\].text: has token 110"):
        await plan(embedding, EmbedTask(inputs=(TextInput("x" * 100),)), **FACTS)
    tokenizer.special = False
    with pytest.raises(InvalidArgument, match=r"inputs\[0\].text: has no tokens"):
        await plan(embedding, EmbedTask(inputs=(TextInput(" "),)), **FACTS)


async def test_a_result_of_another_size_is_the_workers_fault(plan):
    made = await plan(embedding, EmbedTask(inputs=TWO), **FACTS)
    data = struct.pack("<16f", *range(16))
    assert made.read(data).data == data
    for wrong in (b"", data[:-1], data + b"\0\0\0\0"):
        with pytest.raises(Internal) as caught:
            made.read(wrong)
        assert caught.value.reason == "RESULT_MALFORMED"
    unsaid = await plan(embedding, EmbedTask(inputs=TWO), tasks=("embed",))
    assert unsaid.read(data).dimensions == 8
