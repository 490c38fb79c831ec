"""What the commands say of what can be asked of a model."""

from __future__ import annotations

from treadle.cli.models_tasks import task_rows
from treadle.client import TaskFacts


def test_an_embedder():
    facts = TaskFacts(
        tasks=("embed", "rerank"),
        pooling="mean",
        normalize=True,
        embedding_dimensions=384,
        prompts={"query": "find: "},
        default_prompt_name="query",
        similarity="cosine",
        max_input_tokens=256,
    )
    assert dict(task_rows(facts)) == {
        "tasks": "embed, rerank",
        "pooling": "mean, normalised",
        "dimensions": "384",
        "similarity": "cosine",
        "prompts": "query 'find: '",
        "default prompt": "query",
        "longest input": "256 tokens",
    }
    assert dict(task_rows(TaskFacts(tasks=("embed",))))["pooling"] == "the folder does not say"


def test_only_the_first_labels():
    labels = tuple(f"L{number}" for number in range(28))
    facts = TaskFacts(tasks=("classify",), labels=labels, multi_label=True, max_input_tokens=512)
    assert dict(task_rows(facts)) == {
        "tasks": "classify",
        "labels": "28: L0, L1, L2, L3, L4, and 23 more (several at once)",
        "longest input": "512 tokens",
    }


def test_words_do_not_steer_the_terminal():
    facts = TaskFacts(tasks=("tag",), labels=("O", "\x1b[2Jgone"))
    assert dict(task_rows(facts))["labels"] == "2: O, ?[2Jgone"


def test_a_cross_encoder_and_a_decoder():
    ranks = TaskFacts(tasks=("classify", "rerank"), labels=("LABEL_0",), rank_activation="sigmoid")
    assert dict(task_rows(ranks))["rank"] == "sigmoid"
    assert task_rows(TaskFacts(tasks=("generate", "score"))) == [("tasks", "generate, score")]
    assert task_rows(TaskFacts()) == [("tasks", "-")]
