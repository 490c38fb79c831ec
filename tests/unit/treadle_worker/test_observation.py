"""What a worker's spans and counters say of generations and tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from treadle.api.worker.v1.queue_pb2 import LaneEntry, TaskWork
from treadle.errors import Cancelled, Internal
from treadle.queue import codec
from treadle.queue.lanes import Delivery
from treadle.queue.log import START, Appended
from treadle.telemetry.otel import OtelTracer
from treadle_worker.convert_queue import to_job
from treadle_worker.engine_protocol import EngineStats, StepOutputs, TaskOutput
from treadle_worker.metrics import WorkerMetrics
from treadle_worker.observation import Observation
from treadle_worker.requests import RequestTable
from treadle_worker.tasks import RunningTask

WORKS = {
    "embeddings": {"embed": {"pooling": "mean"}},
    "classify": {"classify": {}},
    "tag": {"tag": {}},
    "rerank": {"rank": {}},
    "score": {"score": {}},
}
INPUTS = [{"token_ids": [1, 2, 3], "first": 1}, {"token_ids": [4, 5], "first": 1}]


class Watched:
    """An observation, what it counts, and the spans that it ends."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = OtelTracer("worker", self._exporter)
        self.table = RequestTable()
        self._registry = CollectorRegistry()
        self.observation = Observation(
            WorkerMetrics(self._registry).model("m"),
            self.tracer,
            SimpleNamespace(now_ms=lambda: 1500.0),
            self.table,
        )

    def spans(self):
        self.tracer._provider.force_flush()
        return self._exporter.get_finished_spans()

    def counted(self, name: str, **labels: str) -> float:
        return self._registry.get_sample_value(f"treadle:{name}", {"model_name": "m", **labels}) or 0.0

    def claim(self, work: dict[str, object], name: str = "r") -> RunningTask:
        entry = LaneEntry(
            tenant="t", request_id=name, task=TaskWork(inputs=INPUTS, **work), profile="p", model_name="alias"
        )
        delivery = Delivery("lane", "1-0", b"")
        request = RunningTask(to_job(codec.encode(entry)), delivery, 1, last=START, watchers=set())
        self.table.add(request)
        self.observation.claimed(request)
        return request


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    watched = Watched()
    yield watched
    await watched.tracer.close()


@pytest.mark.parametrize(("operation", "work"), WORKS.items())
async def test_a_task_has_a_span_and_is_counted_by_its_name(watched, operation, work):
    request = watched.claim(work)
    step = StepOutputs(
        outputs=[],
        stats=EngineStats(num_steps=1),
        admitted=[request.engine_id],
        preempted=[request.engine_id],
    )
    watched.observation.stepped(step)
    output = TaskOutput(request_id=request.engine_id, data=b"1")
    watched.observation.answered(request, output)
    request.accept(output)
    watched.observation.let_go(request, Appended.WRITTEN)
    (span,) = watched.spans()
    assert span.name == f"{operation} m"
    said = dict(span.attributes)
    assert said["gen_ai.operation.name"] == operation
    assert (said["gen_ai.request.model"], said["gen_ai.usage.input_tokens"]) == ("alias", 5)
    assert (said["treadle.task_inputs"], said["treadle.outcome"]) == (2, "written")
    assert not {name for name in said if "output" in name or "finish" in name}
    assert [event.name for event in span.events] == ["scheduled", "preemption"]
    task = {"embeddings": "embed"}.get(operation, operation)
    assert watched.counted("engine_task_inputs_total", task=task) == 2
    assert watched.counted("engine_task_tokens_total", task=task) == 5
    assert watched.counted("request_queue_time_seconds_count") == 1
    assert watched.counted("request_ends_total", outcome="finished") == 1


async def test_tasks_that_fail_count_no_texts(watched):
    for number, error in enumerate((Internal("no", reason="ENGINE_ERROR"), Cancelled("asked"))):
        request = watched.claim(WORKS["score"], str(number))
        watched.observation.answered(request, TaskOutput(request_id=request.engine_id, error="no"))
        request.fail(error)
        watched.observation.let_go(request, Appended.WRITTEN)
    assert watched.counted("engine_task_inputs_total", task="score") == 0
    assert watched.counted("request_ends_total", outcome="failed") == 1
    assert watched.counted("request_ends_total", outcome="cancelled") == 1
    errors = [span.attributes.get("error.type") for span in watched.spans()]
    assert errors == ["ENGINE_ERROR", "CANCELLED"]
