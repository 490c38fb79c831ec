"""The metrics of a running suite move by what was asked of it, and say nothing of what was said."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from client_record import Record, attach, start
from metrics_view import MetricsView, Scrape
from waiting import until

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from treadle.errors import TreadleError
from treadle.rpc import open_channel

MODEL = "smollm2"
SECRET = "zebrafish"
GATEWAY = {
    *(
        f"{histogram}_{part}"
        for histogram in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
        )
        for part in ("bucket", "sum", "count")
    ),
    "request_success_total",
    "request_failure_total",
    "request_resumes_total",
    "gateway_requests_held",
}
WORKER = {
    *(
        f"{histogram}_{part}"
        for histogram in ("request_queue_time_seconds", "cancel_to_free_seconds")
        for part in ("bucket", "sum", "count")
    ),
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "model_ready"),
    *("lane_requests_waiting", "lane_oldest_waiting_age_seconds", "engine_resident_memory_bytes"),
    *("engine_starts_total", "engine_steps_total", "num_preemptions_total"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total"),
    *("prompt_tokens_total", "generation_tokens_total"),
    *("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"),
    *("redeliveries_total", "request_ends_total"),
    *("engine_turn_seconds_total", "engine_turn_waited_seconds_total"),
    *(f"engine_device_memory_{kind}_bytes" for kind in ("allocated", "reserved", "peak")),
}
EVERYBODY = {
    *(f"event_loop_lag_seconds_{part}" for part in ("bucket", "sum", "count")),
    *(f"rpc_duration_seconds_{part}" for part in ("bucket", "sum", "count")),
    *("rpc_requests_total", "rpc_requests_running"),
}
UNCALLED = {name for name in EVERYBODY if name.startswith(("rpc_duration", "rpc_requests_running"))}
TASKS = {
    *("task_requests_total", "task_inputs_total", "task_prompt_tokens_total"),
    *(f"task_latency_seconds_{part}" for part in ("bucket", "sum", "count")),
    *("engine_task_inputs_total", "engine_task_tokens_total"),
}
"""There once a task was asked, as another test may have done."""
OWN = {"gateway": GATEWAY, "worker": WORKER, "tokenizer": {"template_kills_total"}}
METHOD = {"rpc_service": "treadle.api.inference.v1.InferenceService", "method": "GenerateStream"}


@dataclass
class Moved:
    """What has changed between two looks."""

    before: Scrape
    after: Scrape

    def by(self, name: str, **labels: str) -> float:
        return self.after.value(name, **labels) - self.before.value(name, **labels)


@pytest.fixture
async def stub(suite) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    async with open_channel(suite.addresses["gateway"]) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
async def view(suite) -> MetricsView:
    """The suite's metrics, once it holds nothing of other tests."""
    view = MetricsView(suite.home)
    await view.until("gateway", lambda look: look.value("gateway_requests_held") == 0, "nobody is held")
    await view.until("worker", idle, "the engine is empty")
    return view


def idle(look: Scrape) -> bool:
    held = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lane_requests_waiting")
    return not any(look.value(name) for name in held)


def ask(text: str, max_new_tokens: int, **fields) -> generation_pb2.Generation:
    stopping = {"max_new_tokens": max_new_tokens} | fields.pop("stopping", {})
    sampling = {"temperature": 0.0} | fields.pop("sampling", {})
    given = fields if "chat" in fields else {"text": f"{SECRET} {text}"} | fields
    return generation_pb2.Generation(**{"model": MODEL} | given, stopping=stopping, sampling=sampling)


def check_labels(look: Scrape, names: set[str]) -> int:
    """Every series of these names belongs to a model; how many there are."""
    series = [dict(labels) for name in names for labels in look.labels(name)]
    assert all("model_name" in labels for labels in series)
    return len(series)


async def test_every_service_tells_its_own_metrics_and_no_other_ones(suite, view, stub):
    await Record().listen(start(stub, ask("Once upon", 3)))
    await Record().listen(start(stub, ask("Once upon", 3, sampling={"temperature": -1.0})))
    assert set(view.services.values()) == {"gateway", "registry", "tokenizer", "trainer", "worker"}
    found = {}
    for replica, service in view.services.items():
        look = view.look(replica)
        expected = EVERYBODY | OWN.get(service, set())
        if service in ("gateway", "worker"):
            expected |= TASKS & look.names
        if service in ("trainer", "worker"):  # called for their health alone, unless by another test
            expected -= UNCALLED - look.names
        assert look.names == expected, (replica, look.names ^ expected)
        assert ("process_resident_memory_bytes", frozenset()) in look.samples
        assert look.value("event_loop_lag_seconds_count") > 0
        assert look.value("rpc_requests_total", rpc_service="grpc.health.v1.Health", method="Check") > 0
        found[replica] = len(look.samples)
    check_labels(view.look("gateway"), GATEWAY - {"request_resumes_total", "gateway_requests_held"})
    worker = view.look("worker")
    assert check_labels(worker, WORKER) > 40
    assert all(dict(labels)["model_name"] == MODEL for name in WORKER for labels in worker.labels(name))
    assert worker.value("model_ready", model_name=MODEL) == 1
    assert worker.value("engine_starts_total", model_name=MODEL) >= 1
    assert worker.value("engine_resident_memory_bytes") > 100 << 20
    print(f"series by replica: {found}")


async def test_complete_answers_are_counted_one_by_one(view, stub):
    long = "The weaver throws the shuttle. " * 20
    hello = {"messages": [{"role": "user", "content": "Say hello in one short sentence."}]}
    whole = (await Record().listen(start(stub, ask("One, two, three, four,", 24)))).told()
    before = {service: view.look(service) for service in ("gateway", "worker", "tokenizer")}
    kept = ask(long, 10, request_id=f"m-{uuid.uuid4().hex}", disconnect={"mode": "DISCONNECT_MODE_DETACH"})
    asked = [
        ask("A", 12, stopping={"ignore_eos": True}),
        ask(long, 9, stopping={"ignore_eos": True}),
        ask("", 64, chat=hello),
        ask("One, two, three, four,", 24, stopping={"stop_strings": [whole.text[9:14]]}),
        kept,
    ]
    records = [await Record().listen(start(stub, one)) for one in asked]
    again = [await Record().listen(attach(stub, kept)), await Record().listen(start(stub, kept))]
    assert all(record.chunks == records[-1].chunks for record in again)
    told = [record.told() for record in records]
    expected = {"finished": len(asked)}
    worker = await view.until(
        "worker",
        lambda look: (
            idle(look)
            and look.value("request_ends_total", outcome="finished")
            - before["worker"].value("request_ends_total", outcome="finished")
            == expected["finished"]
        ),
        "the worker has ended all of them",
    )
    moved = {
        "gateway": Moved(before["gateway"], view.look("gateway")),
        "worker": Moved(before["worker"], worker),
        "tokenizer": Moved(before["tokenizer"], view.look("tokenizer")),
    }

    gateway = moved["gateway"]
    reasons = {
        reason: gateway.by("request_success_total", model_name=MODEL, finished_reason=reason)
        for reason in ("stop", "length")
    }
    assert reasons == {"stop": 2, "length": 3}
    assert gateway.by("request_success_total") == 5
    assert gateway.by("request_failure_total") == 0
    assert gateway.by("request_resumes_total") == 2
    messages = [sum(chunk.HasField("tokens") for chunk in record.chunks) for record in records]
    counts = {
        "time_to_first_token_seconds_count": 5,
        "inter_token_latency_seconds_count": sum(messages) - 5,
        "e2e_request_latency_seconds_count": 5,
        "request_prompt_tokens_count": 5,
        "request_prompt_tokens_sum": sum(one.prompt_tokens for one in told),
        "request_generation_tokens_sum": sum(one.output_tokens for one in told),
    }
    assert {name: gateway.by(name, model_name=MODEL) for name in counts} == counts
    assert 0 < gateway.by("time_to_first_token_seconds_sum") < gateway.by("e2e_request_latency_seconds_sum")
    assert gateway.by("rpc_requests_total", **METHOD, code="OK") == 6
    assert gateway.by("rpc_requests_total", method="Attach", code="OK") == 1
    assert gateway.after.value("rpc_requests_running", **METHOD) == 0

    engine = moved["worker"]
    cached = sum(record.chunks[-1].finished.usage.cached_tokens for record in records)
    assert cached >= 64, "the long prompt came twice"
    counts = {
        "request_queue_time_seconds_count": 5,
        "prompt_tokens_total": sum(one.prompt_tokens for one in told),
        "prefix_cache_queries_total": sum(one.prompt_tokens for one in told),
        "prefix_cache_hits_total": cached,
        "num_preemptions_total": 0,
        "redeliveries_total": 0,
        "cancel_to_free_seconds_count": 0,
        "request_ends_total": 5,
    }
    assert {name: engine.by(name, model_name=MODEL) for name in counts} == counts
    assert engine.by("generation_tokens_total") >= sum(one.output_tokens for one in told)
    accepted = engine.by("spec_decode_num_accepted_tokens_total")
    assert engine.by("engine_steps_total") + accepted >= max(one.output_tokens for one in told)
    assert engine.by("spec_decode_num_draft_tokens_total") >= accepted
    tokenizer = moved["tokenizer"]
    assert tokenizer.by("rpc_requests_total", method="Encode", code="OK") == 4
    assert tokenizer.by("rpc_requests_total", method="RenderChat", code="OK") == 1
    print(f"{len(asked)} answers, {sum(messages)} messages, cached {cached}; {counts}; {reasons}")


async def _refused(stub, asked: generation_pb2.Generation) -> TreadleError:
    record = await Record().listen(start(stub, asked))
    assert record.error is not None
    return record.error


async def test_what_does_not_end_well_is_counted_by_its_reason(view, stub):
    before = {service: view.look(service) for service in ("gateway", "worker")}
    for _ in range(2):
        assert (await _refused(stub, ask("x", 5, sampling={"temperature": -1.0}))).reason == "INVALID_FIELD"
    assert (await _refused(stub, ask("x", 5, model=f"{SECRET}-unknown"))).reason == "MODEL_NOT_FOUND"
    late = ask("x", 4000, timeout={"nanos": 800_000_000}, stopping={"ignore_eos": True})
    assert (await _refused(stub, late)).reason == "DEADLINE_EXCEEDED"
    for _ in range(2):
        request = inference_pb2.GenerateStreamRequest(
            generation=ask("leaves", 4000, stopping={"ignore_eos": True})
        )
        call = stub.GenerateStream(request, timeout=120)
        for _ in range(3):
            await call.read()
        running = await view.until(
            "worker", lambda look: look.value("num_requests_running", model_name=MODEL) == 1, "one runs"
        )
        assert 0 < running.value("kv_cache_usage_perc", model_name=MODEL) <= 1
        assert view.look("gateway").value("gateway_requests_held") == 1
        assert view.look("gateway").value("rpc_requests_running", **METHOD) == 1
        call.cancel()
        await view.until("worker", idle, "the engine is empty")
    named = ask("cancelled", 4000, stopping={"ignore_eos": True}, request_id=f"m-{uuid.uuid4().hex}")
    record = Record()
    task = asyncio.create_task(record.listen(start(stub, named)))
    await until(lambda: record.num_tokens > 0, "it has a token")
    cancel = inference_pb2.CancelRequest(request_id=named.request_id)
    assert (await stub.Cancel(cancel, timeout=10)).cancelled
    assert (await task).error is not None

    worker = await view.until(
        "worker",
        lambda look: idle(look) and Moved(before["worker"], look).by("cancel_to_free_seconds_count") >= 4,
        "what was cancelled is free",
    )
    gateway = await view.until(
        "gateway", lambda look: look.value("gateway_requests_held") == 0, "nobody is held"
    )
    moved = Moved(before["gateway"], gateway)
    reasons = {
        ("", "INVALID_FIELD"): 2,
        ("", "MODEL_NOT_FOUND"): 1,
        (MODEL, "DEADLINE_EXCEEDED"): 1,
        (MODEL, "CANCELLED"): 3,
    }
    found = {
        (model, reason): moved.by("request_failure_total", model_name=model, reason=reason)
        for model, reason in reasons
    }
    assert found == reasons
    assert moved.by("request_failure_total") == 7
    assert moved.by("request_success_total") == 0
    codes = {"INVALID_ARGUMENT": 2, "NOT_FOUND": 1, "DEADLINE_EXCEEDED": 1, "CANCELLED": 3, "OK": 0}
    assert {code: moved.by("rpc_requests_total", **METHOD, code=code) for code in codes} == codes
    ended = Moved(before["worker"], worker)
    outcomes = {
        outcome: ended.by("request_ends_total", model_name=MODEL, outcome=outcome)
        for outcome in ("finished", "failed", "cancelled", "fenced", "vanished", "handed_back")
    }
    assert sum(outcomes.values()) == 4
    assert outcomes["cancelled"] >= 3
    assert outcomes["cancelled"] + outcomes["failed"] == 4
    assert ended.by("cancel_to_free_seconds_count", model_name=MODEL) == 4
    freed_s = ended.by("cancel_to_free_seconds_sum") / 4
    assert worker.value("num_requests_running") == 0
    print(f"{found}; {outcomes}; blocks were free after {freed_s:.3f} s on average")


async def test_nothing_that_was_said_stands_in_the_metrics(suite, view, stub):
    """After the tests before, too: their prompts, names of models that there are not, ids."""
    answers = [
        await Record().listen(start(stub, ask(text, 8)))
        for text in ("The capital of France is", "Rivers run")
    ]
    asked = {record.chunks[0].started.request_id for record in answers}
    words = {word for record in answers for word in record.told().text.split() if len(word) > 6}
    looks = {}
    for replica in view.services:
        lines = view.look(replica).text.splitlines()
        looks[replica] = "\n".join(line for line in lines if not line.startswith("#"))
        assert len(looks[replica]) > 1000
    for word in {SECRET, "zebra", "weaver", "capital", *words, *asked}:
        assert not [replica for replica, text in looks.items() if word in text], word
    print(f"{len(words) + len(asked) + 4} words are in none of {len(looks)} services' metrics")
