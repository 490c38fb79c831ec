"""What `treadle up` offers to type first."""

from __future__ import annotations

from treadle.cli.first_steps import first_steps
from treadle.client import ServedModel


def model(name: str, *tasks: str, error: str = "") -> ServedModel:
    return ServedModel(name, "sha256:0", "p", 512, 100, 1, error=error, tasks=tasks)


def test_only_what_the_models_can_do():
    lines = first_steps([model("minilm", "embed", "rerank")], "host:1")
    assert [line.split()[1] for line in lines] == ["embed", "rerank"]
    assert all(line.endswith("--address host:1") and "--model" not in line for line in lines)


def test_the_client_line_asks_a_model_that_generates():
    lines = first_steps([model("minilm", "embed"), model("smollm2", "generate", "score")], "host:1")
    assert [line.split()[1] for line in lines] == ["chat", "generate", "-c", "embed"]
    assert 'model="smollm2"' in lines[2]
    compile(lines[2].split("'")[1], "the line", "exec")


def test_a_model_is_named_where_several_can():
    models = [model("broken", "generate", error="no"), model("a", "generate"), model("b", "generate")]
    assert "--model a" in first_steps(models, "host:1")[0]
    assert first_steps(models[:1], "host:1") == []
