"""Every field of a task: what is refused, under which name, and that what is allowed passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treadle.errors import InvalidArgument, Unimplemented
from treadle_gateway.config import GatewayConfig
from treadle_gateway.generation import TokenPrompt
from treadle_gateway.tasks.task import (
    ClassifyTask,
    EmbedTask,
    RerankTask,
    ScoreInput,
    ScoreTask,
    TagTask,
    TaskContext,
    TextInput,
)
from treadle_gateway.tasks.validation import validate
from treadle_gateway.violations import MAX_VIOLATIONS

LIMITS = GatewayConfig(max_task_bytes=1000, max_task_tokens=900)
CONTEXT = TaskContext(model="tiny", tenant="default")
ONE = (TextInput("Hello"),)
EMBED = EmbedTask(CONTEXT, ONE)
CLASSIFY = ClassifyTask(CONTEXT, ONE)
TAG = TagTask(CONTEXT, ONE)
RERANK = RerankTask(CONTEXT, "what", ("this", "that"))
SCORE = ScoreTask(CONTEXT, (ScoreInput("a", " b"),))
TASKS = (EMBED, CLASSIFY, TAG, RERANK, SCORE)


def with_input(task, *inputs):
    return replace(task, inputs=inputs)


IDS = TokenPrompt((1, 2))
BAD = [
    *[(with_input(task), "inputs") for task in (EMBED, CLASSIFY, TAG, SCORE)],
    *[(with_input(task, *ONE * 257), "inputs") for task in (EMBED, CLASSIFY, TAG)],
    *[(with_input(task, *ONE, TextInput("")), "inputs[1].text") for task in (EMBED, CLASSIFY, TAG)],
    *[(with_input(task, TextInput("é" * 501)), "inputs") for task in (EMBED, CLASSIFY, TAG)],
    *[(with_input(task, *[TextInput("x" * 101)] * 10), "inputs") for task in (EMBED, CLASSIFY, TAG)],
    (with_input(EMBED, TextInput("a", "b")), "inputs[0].pair"),
    (with_input(TAG, TextInput("a", "b")), "inputs[0].pair"),
    (with_input(CLASSIFY, TextInput("a", "")), "inputs[0].pair"),
    (with_input(CLASSIFY, TextInput("a", "x" * 1000)), "inputs"),
    (replace(EMBED, pooling=4), "pooling"),
    (replace(EMBED, pooling=-1), "pooling"),
    (replace(EMBED, dimensions=0), "dimensions"),
    (replace(EMBED, prompt_name="x" * 257), "prompt_name"),
    (replace(CLASSIFY, top_k=0), "top_k"),
    (replace(TAG, aggregation=5), "aggregation"),
    (replace(RERANK, query=""), "query"),
    (replace(RERANK, documents=()), "documents"),
    (replace(RERANK, documents=("x",) * 257), "documents"),
    (replace(RERANK, documents=("x", "")), "documents[1]"),
    (replace(RERANK, query="x" * 400, documents=("x", "y", "z")), "documents"),
    (replace(RERANK, top_n=0), "top_n"),
    (with_input(SCORE, ScoreInput("a", "")), "inputs[0].continuation"),
    (with_input(SCORE, ScoreInput()), "inputs[0].continuation"),
    (with_input(SCORE, *[ScoreInput("a", "b")] * 257), "inputs"),
    (with_input(SCORE, ScoreInput("", "b", continuation_ids=IDS)), "inputs[0].continuation"),
    (with_input(SCORE, ScoreInput("a", "", IDS, IDS)), "inputs[0].context"),
    (with_input(SCORE, ScoreInput("", "b", IDS)), "inputs[0].context_token_ids"),
    (with_input(SCORE, *[ScoreInput("", "", IDS, TokenPrompt((1,) * 99))] * 9), "inputs"),
    (with_input(SCORE, ScoreInput("", "", TokenPrompt(()), IDS)), "inputs[0].context_token_ids.ids"),
    (
        with_input(SCORE, ScoreInput(continuation_ids=TokenPrompt(()))),
        "inputs[0].continuation_token_ids.ids",
    ),
    (
        with_input(SCORE, ScoreInput(continuation_ids=TokenPrompt((1,), "x" * 257))),
        "inputs[0].continuation_token_ids.tokenizer_digest",
    ),
    (with_input(SCORE, ScoreInput("x" * 1000, "y")), "inputs"),
]
BAD_CONTEXT = [
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "{a}"}, "request_id"),
    ({"tenant": "a:b"}, "tenant"),
    ({"model": ""}, "model"),
    ({"model": "a\nb"}, "model"),
    ({"profile": "x" * 257}, "profile"),
    ({"priority": 4}, "priority"),
    ({"timeout_s": 0.0}, "timeout"),
    ({"timeout_s": 3601.0}, "timeout"),
]


@pytest.mark.parametrize(("task", "field"), BAD)
def test_a_bad_field_is_named_alone(task, field):
    with pytest.raises(InvalidArgument) as caught:
        validate(task, LIMITS)
    assert [one.field for one in caught.value.fields] == [field]
    assert caught.value.message.startswith(f"{field}: ")
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize(("change", "field"), BAD_CONTEXT)
def test_a_bad_context_is_named_alone(task, change, field):
    with pytest.raises(InvalidArgument) as caught:
        validate(replace(task, context=replace(CONTEXT, **change)), LIMITS)
    assert [one.field for one in caught.value.fields] == [f"context.{field}"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_adapters_have_no_code_yet(task):
    with pytest.raises(Unimplemented) as caught:
        validate(replace(task, context=replace(CONTEXT, adapter="a")), LIMITS)
    assert [one.field for one in caught.value.fields] == ["context.adapter"]


def test_all_that_is_wrong_is_said_at_once_within_a_bound():
    with pytest.raises(InvalidArgument, match=r"\(and 2 more\)") as caught:
        validate(replace(EMBED, inputs=(TextInput(""),), dimensions=0, pooling=9), LIMITS)
    assert len(caught.value.fields) == 3
    for task in (
        with_input(CLASSIFY, *[TextInput("")] * 256),
        replace(RERANK, documents=("",) * 256),
        with_input(SCORE, *[ScoreInput()] * 256),
    ):
        with pytest.raises(InvalidArgument) as caught:
            validate(task, LIMITS)
        assert len(caught.value.fields) == MAX_VIOLATIONS


@pytest.mark.parametrize(
    "task",
    [
        *TASKS,
        with_input(EMBED, *ONE * 200),
        with_input(EMBED, TextInput("x" * 1000)),
        replace(EMBED, pooling=3, dimensions=1, normalize=False, prompt_name="query", truncate=True),
        with_input(CLASSIFY, TextInput("a", "b")),
        replace(CLASSIFY, top_k=2**32 - 1, multi_label=True),
        replace(TAG, aggregation=4, include_outside=True),
        replace(RERANK, top_n=1, raw_scores=True),
        with_input(SCORE, ScoreInput("", "b")),
        with_input(SCORE, ScoreInput("", "", IDS, IDS), ScoreInput("", "", None, IDS), ScoreInput(" ", " ")),
        replace(EMBED, context=replace(CONTEXT, priority=3, request_id="a.B_c:d-9", timeout_s=3600.0)),
    ],
)
def test_what_is_allowed_passes(task):
    validate(task, LIMITS)
