"""What a gateway counts and traces of one task."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.errors import NotFound, Unavailable
from treadle.telemetry.otel import OtelTracer
from treadle.telemetry.tracing import bind_span
from treadle_gateway.disconnects import client_gone
from treadle_gateway.metrics import GatewayMetrics
from treadle_gateway.tasks.observation import TaskObservation
from treadle_gateway.tasks.task import ClassifyTask, EmbedTask, TaskContext, TextInput
from treadle_gateway.tasks.work import Embeddings, TaskAnswer

SECRET = "nobody may read this"
ENTRY = LaneEntry(task={"inputs": [{"token_ids": [1, 2, 3]}, {"token_ids": [4]}]})
ANSWER = TaskAnswer("sha256:a", "p", 4, Embeddings(2, 1, bytes(8)))
CONTEXT = TaskContext(model="tiny")
EMBED = EmbedTask(CONTEXT, (TextInput(SECRET),))


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def observe(registry: CollectorRegistry):
    metrics = GatewayMetrics(registry)
    return lambda task=EMBED: TaskObservation(metrics, task, "r1")


def values(registry: CollectorRegistry, model: str = "tiny", task: str = "embed") -> list[float]:
    names = (
        "task_requests_total",
        "task_inputs_total",
        "task_prompt_tokens_total",
        "task_latency_seconds_count",
    )
    labels = {"model_name": model, "task": task}
    return [registry.get_sample_value(f"treadle:{name}", labels) or 0.0 for name in names]


def test_an_answer_is_counted_once_and_who_joins_is_not(observe, registry):
    for joins in (False, True):
        observation = observe()
        observation.begin()
        observation.prepared(None if joins else ENTRY)
        observation.answered(ANSWER.prompt_tokens)
        observation.end(client_gone())
    assert values(registry) == [1, 2, 4, 1]
    assert registry.get_sample_value("treadle:request_resumes_total") == 1
    generations = [one for one in registry.collect() if one.name == "treadle:request_success"]
    assert not generations[0].samples, "a task's end is none of a generation's"


def test_failures_are_counted_by_reason_and_no_client_makes_a_series(observe, registry):
    for number in range(20):
        observation = observe(EmbedTask(TaskContext(model=f"guess-{number}")))
        observation.begin()
        observation.end(NotFound(SECRET, reason="MODEL_NOT_FOUND"))
    known = observe()
    known.prepared(ENTRY)
    known.end(Unavailable(SECRET, reason="ENGINE_DIED"))
    found = {
        (sample.labels["model_name"], sample.labels["reason"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "treadle:request_failure_total"
    }
    assert found == {("", "MODEL_NOT_FOUND"): 20, ("tiny", "ENGINE_DIED"): 1}
    assert values(registry) == [0, 2, 4, 0]


def test_a_span_has_the_names_of_the_field_and_no_word_of_the_request(observe):
    exporter = InMemorySpanExporter()
    tracer = OtelTracer("gateway", exporter)
    with bind_span(tracer.span("call")):
        embed, classify = observe(), observe(ClassifyTask(CONTEXT, (TextInput(SECRET),)))
        embed.begin()
        classify.begin()
    embed.prepared(ENTRY)
    embed.answered(ANSWER.prompt_tokens)
    embed.end(client_gone())
    classify.end(Unavailable(SECRET, reason="ENGINE_DIED"))
    tracer._provider.force_flush()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert dict(spans["embeddings tiny"].attributes) == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "treadle",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "r1",
        "gen_ai.usage.input_tokens": 4,
    }
    assert spans["classify tiny"].attributes["error.type"] == "ENGINE_DIED"
    assert not any(SECRET in span.to_json() for span in spans.values())
