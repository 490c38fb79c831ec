"""What a gateway counts of one request, whichever way it goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from treadle.api.inference.v1 import generation_pb2
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.errors import Cancelled, NotFound, Unavailable
from treadle.queue.log import EntryId
from treadle.telemetry.otel import OtelTracer
from treadle.telemetry.tracing import bind_span
from treadle_gateway import observation as module
from treadle_gateway.cursor import Cursor
from treadle_gateway.disconnects import client_gone
from treadle_gateway.generation import ChatMessage, ChatPrompt, Generation, TextPrompt
from treadle_gateway.metrics import GatewayMetrics
from treadle_gateway.observation import GenerationObservation
from treadle_gateway.token_stream import Body, Chunk

SECRET = "nobody may read this"
ENTRY = LaneEntry(prompt_token_ids=[1, 2, 3])
LENGTH, STOP_TOKEN, STOP_STRING = (
    generation_pb2.FINISH_REASON_LENGTH,
    generation_pb2.FINISH_REASON_STOP_TOKEN,
    generation_pb2.FINISH_REASON_STOP_STRING,
)


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> GatewayMetrics:
    return GatewayMetrics(registry)


@pytest.fixture
def value(registry: CollectorRegistry) -> Callable[..., float]:
    """A sample's value; 0 where there is none."""

    def value(name: str, model: str | None = "tiny", **labels: str) -> float:
        wanted = labels if model is None else {"model_name": model, **labels}
        return registry.get_sample_value(f"treadle:{name}", wanted) or 0.0

    return value


@pytest.fixture
def observe(clock: Clock, metrics: GatewayMetrics) -> Callable[..., GenerationObservation]:
    def observe(**fields) -> GenerationObservation:
        asked = Generation(**{"model": "tiny", "prompt": TextPrompt(SECRET)} | fields)
        return GenerationObservation(metrics, asked, "r1")

    return observe


def chunk(body: Body) -> Chunk:
    return Chunk(Cursor(EntryId(1, 1), 0), body)


def tokens(*ids: int) -> Chunk:
    return chunk(generation_pb2.TokenDelta(token_ids=ids, text=SECRET))


def finished(*reasons: int, output_tokens: int = 4) -> Chunk:
    choices = [{"finish_reason": reason} for reason in reasons]
    usage = {"prompt_tokens": 3, "output_tokens": output_tokens}
    return chunk(generation_pb2.Finished(choices=choices, usage=usage))


def test_an_answer_is_timed_from_its_arrival(observe, clock, value):
    observation = observe()
    observation.begin()
    clock.now += 1.0
    observation.prepared(ENTRY)
    observation.chunk(chunk(generation_pb2.Started()))
    for seconds, ids in ((0.5, [7]), (0.25, [8, 9]), (0.125, [10])):
        clock.now += seconds
        observation.chunk(tokens(*ids))
    clock.now += 0.5
    observation.chunk(finished(LENGTH))
    observation.end(client_gone())
    found = {
        name: (value(f"{name}_count"), value(f"{name}_sum"))
        for name in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
        )
    }
    assert list(found.values()) == [(1, 1.5), (2, 0.375), (1, 2.375), (1, 3), (1, 4)]
    assert value("request_success_total", finished_reason="length") == 1
    assert value("request_failure_total", reason="CANCELLED") == 0
    print(found)


@pytest.mark.parametrize(
    ("reasons", "counted"),
    [
        ([LENGTH], {"length": 1, "stop": 0}),
        ([STOP_TOKEN], {"length": 0, "stop": 1}),
        ([STOP_STRING], {"length": 0, "stop": 1}),
        ([STOP_STRING, STOP_TOKEN], {"length": 0, "stop": 1}),
    ],
)
def test_success_is_counted_by_its_reason(observe, value, reasons, counted):
    observation = observe()
    observation.begin()
    observation.prepared(ENTRY)
    observation.chunk(finished(*reasons))
    observation.end(client_gone())
    assert {reason: value("request_success_total", finished_reason=reason) for reason in counted} == counted
    assert value("time_to_first_token_seconds_count") == 0, "an answer without tokens has no first one"


def test_failure_is_counted_by_its_reason(observe, value):
    for error in (Unavailable(SECRET, reason="ENGINE_DIED"), client_gone(), Cancelled(SECRET)):
        observation = observe()
        observation.begin()
        observation.prepared(ENTRY)
        observation.chunk(tokens(7))
        observation.end(error)
    assert value("request_failure_total", reason="ENGINE_DIED") == 1
    assert value("request_failure_total", reason="CANCELLED") == 2
    assert value("time_to_first_token_seconds_count") == 3
    assert value("e2e_request_latency_seconds_count") == 0, "only whole answers are timed"
    assert value("request_generation_tokens_count") == 0


def test_no_client_makes_a_series(observe, value, registry):
    """A name is a label only once it is known that there is such a model."""
    for number in range(50):
        observation = observe(model=f"guess-{number}")
        observation.begin()
        observation.end(NotFound(SECRET, reason="MODEL_NOT_FOUND"))
    labels = {
        sample.labels["model_name"]
        for family in registry.collect()
        for sample in family.samples
        if "model_name" in sample.labels
    }
    assert labels == {""}
    assert value("request_failure_total", "", reason="MODEL_NOT_FOUND") == 50


def test_who_joins_a_run_counts_as_a_resume_alone(observe, clock, value):
    for joins in (False, True, True):
        observation = observe()
        observation.begin()
        observation.prepared(None if joins else ENTRY)
        clock.now += 1.0
        for ids in ([7], [8]):
            observation.chunk(tokens(*ids))
        observation.chunk(finished(STOP_TOKEN))
        observation.end(client_gone())
    assert value("request_resumes_total", None) == 2
    for name in (
        "request_prompt_tokens",
        "request_generation_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
    ):
        assert value(f"{name}_count") == 1, name
    assert value("request_success_total", finished_reason="stop") == 1


def test_a_span_has_the_names_of_the_field_and_no_word_of_the_request(observe, recording):
    generation = {"model": "tiny", "prompt": ChatPrompt((ChatMessage("user", SECRET),))}
    with bind_span(recording.tracer.span("call")) as _:
        answered, failed = observe(**generation), observe()
        answered.begin()
        failed.begin()
    answered.prepared(ENTRY)
    answered.chunk(tokens(7))
    answered.chunk(finished(STOP_TOKEN, LENGTH))
    answered.end(client_gone())
    failed.end(Unavailable(SECRET, reason="ENGINE_DIED"))
    chat, text = recording.spans("chat tiny", "text_completion tiny")
    assert dict(chat.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "treadle",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "r1",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("length", "stop"),
    }
    assert [event.name for event in chat.events] == ["queued", "first_token"]
    assert text.attributes["error.type"] == "ENGINE_DIED"
    assert not any(SECRET in span.to_json() for span in (chat, text))


def test_without_a_traced_call_there_is_no_span(observe):
    observation = observe()
    observation.begin()
    observation.prepared(ENTRY)
    observation.chunk(tokens(7))
    observation.chunk(finished(LENGTH))
    observation.end(client_gone())
    assert not observation.span.recording
    assert observation.span.traceparent == ""


class Recording:
    """A tracer whose spans can be read as soon as they have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = OtelTracer("gateway", self._exporter)

    def spans(self, *names: str):
        self.tracer._provider.force_flush()
        found = {span.name: span for span in self._exporter.get_finished_spans()}
        return [found[name] for name in names]


@pytest.fixture
def recording() -> Recording:
    return Recording()
