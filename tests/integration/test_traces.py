"""One trace from a client's span over the queue to whichever worker answers, whatever becomes of workers."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import pytest
from client_record import Record, Told
from queue_view import QueueView
from service_stack import ServiceStack, service_stack
from traces_view import Caller, Traces, input_output, tree
from waiting import until

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from treadle.local.ports import free_ports
from treadle.queue.connection import connect
from treadle.queue.keys import RequestKeys
from treadle.rpc import open_channel

SECRET = "wherefore art thou"
SETTINGS = {
    "OTEL_TRACES_EXPORTER": "console",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
    "TREADLE_WORKER_LEASE_S": "2",
    "TREADLE_WORKER_GRACE_PERIOD_S": "5",
    "TREADLE_GATEWAY_GRACE_PERIOD_S": "5",
}
GENERATE = "treadle.api.inference.v1.InferenceService/GenerateStream"
BATCH = "treadle.api.inference.v1.InferenceService/BatchGenerate"
ENCODE = "treadle.api.tokenizer.v1.TokenizerService/Encode"


@pytest.fixture(scope="module")
def running_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceStack]:
    counts = {"registry": 1, "tokenizer": 1, "gateway": 1, "worker": 2}
    with service_stack(tmp_path_factory.mktemp("traces"), counts, SETTINGS) as stack:
        yield stack


@pytest.fixture
def stack(running_stack: ServiceStack) -> ServiceStack:
    """The stack, whole again."""
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    running_stack.restore()
    return running_stack


@pytest.fixture
def traces(stack: ServiceStack) -> Traces:
    return Traces(stack)


@pytest.fixture
async def stub(stack: ServiceStack) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    async with open_channel(stack["gateway-1"].address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
async def queue(stack: ServiceStack) -> AsyncIterator[QueueView]:
    client = connect(stack.redis_url)
    yield QueueView(client)
    await client.aclose()


@pytest.fixture
def ask(stack: ServiceStack) -> Callable[..., generation_pb2.Generation]:
    def generation(max_new_tokens: int, request_id: str = "", **fields) -> generation_pb2.Generation:
        fields = {"text": f"{SECRET} Romeo", "sampling": {"temperature": 0.0}} | fields
        stopping = {"max_new_tokens": max_new_tokens, "ignore_eos": True}
        return generation_pb2.Generation(
            **({"model": stack.model} | fields), request_id=request_id, stopping=stopping
        )

    return generation


def start(stub, asked: generation_pb2.Generation, caller: Caller):
    request = inference_pb2.GenerateStreamRequest(generation=asked)
    return stub.GenerateStream(request, timeout=120, metadata=caller.metadata)


async def test_one_trace_from_the_client_to_the_worker(stack, traces, stub, ask):
    caller = Caller.begin()
    asked = ask(12, "traced-1")
    told = (await Record().listen(start(stub, asked, caller))).told()
    span_name = f"text_completion {stack.model}"
    spans = await traces.whole(caller.trace_id, GENERATE, ENCODE, span_name, span_name)
    found = tree([span for span in spans if span.service != "registry-1"])
    assert found == {
        f"gateway: {GENERATE}": caller.span_id,
        f"gateway: {span_name}": f"gateway: {GENERATE}",
        f"tokenizer: {ENCODE}": f"gateway: {GENERATE}",
        f"worker: {span_name}": f"gateway: {span_name}",
    }
    by_service = {span.service.partition("-")[0]: span for span in spans if span.name == span_name}
    gateway, worker = by_service["gateway"], by_service["worker"]
    assert {span.name: span.kind for span in spans}[GENERATE] == "SERVER"
    assert (gateway.kind, worker.kind) == ("INTERNAL", "CONSUMER")
    common = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "treadle",
        "gen_ai.request.model": stack.model,
        "gen_ai.response.id": "traced-1",
        "gen_ai.usage.input_tokens": told.prompt_tokens,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert gateway.attributes == common
    assert worker.attributes.items() >= common.items()
    own = {key: worker.attributes[key] for key in worker.attributes.keys() - common.keys()}
    assert own.pop("treadle.profile").startswith("p-")
    assert own == {
        "treadle.epoch": 1,
        "treadle.outcome": "written",
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert gateway.event_names == ["queued", "first_token"]
    assert worker.event_names == ["scheduled", "first_token"]
    assert worker.events[0][1]["treadle.queue_time_s"] >= 0
    assert not any(span.error for span in spans)
    print(f"{len(spans)} spans: {found}")


async def test_without_a_callers_span_each_call_is_a_trace_of_its_own(stack, traces, stub, ask):
    malformed = Caller("z" * 32, "b7ad6b7169203331")
    (await Record().listen(start(stub, ask(3, "malformed-1"), malformed))).told()
    bare = inference_pb2.GenerateStreamRequest(generation=ask(3, "bare-1"))
    (await Record().listen(stub.GenerateStream(bare, timeout=60))).told()

    def found() -> dict[str, set[str]]:
        lines = [line for service in stack.of("gateway") + stack.of("worker") for line in service.log()]
        return {
            request_id: {
                line["context"]["trace_id"]
                for line in lines
                if "context" in line and line["attributes"].get("gen_ai.response.id") == request_id
            }
            for request_id in ("malformed-1", "bare-1")
        }

    await until(lambda: all(found().values()), "both are told", 20, every_s=0.1)
    (malformed_id,), (bare_id,) = found().values()
    assert malformed_id != bare_id


async def test_a_batch_is_one_call_with_a_span_an_item(stack, traces, stub, ask):
    caller = Caller.begin()
    items = [inference_pb2.BatchGenerateRequest(generation=ask(2 + number)) for number in range(4)]
    items.append(inference_pb2.BatchGenerateRequest(generation=ask(3, model="unknown")))
    call = stub.BatchGenerate(iter(items), timeout=60, metadata=caller.metadata)
    answers = [answer async for answer in call]
    assert sorted(answer.WhichOneof("outcome") for answer in answers) == ["error", *["response"] * 4]
    name = f"text_completion {stack.model}"
    spans = await traces.whole(caller.trace_id, BATCH, "text_completion unknown", *[name] * 8)
    (batch,) = (span for span in spans if span.name == BATCH)
    of_items = [span for span in spans if span.service == "gateway-1" and span is not batch]
    assert {span.parent_id for span in of_items} == {batch.span_id}
    workers = [span for span in spans if span.service.startswith("worker")]
    assert len(workers) == 4
    assert {span.parent_id for span in workers} <= {span.span_id for span in of_items}
    assert sorted(input_output(span)[1] for span in workers) == [2, 3, 4, 5]
    assert [span.error for span in of_items if span.error] == ["MODEL_NOT_FOUND"]
    assert batch.error == ""


async def test_a_client_that_leaves_and_a_request_that_is_wrong(stack, traces, stub, ask):
    leaves, wrong = Caller.begin(), Caller.begin()
    call = start(stub, ask(3000, "leaves-1"), leaves)
    for _ in range(3):
        await call.read()
    call.cancel()
    bad = ask(3, sampling={"temperature": -1.0})
    assert (await Record().listen(start(stub, bad, wrong))).error is not None
    name = f"text_completion {stack.model}"
    spans = await traces.whole(leaves.trace_id, GENERATE, name, name)
    errors = {f"{span.service.partition('-')[0]}: {span.name}": span.error for span in spans if span.error}
    assert errors.pop(f"gateway: {GENERATE}") == "CANCELLED"
    assert errors.pop(f"gateway: {name}") == "CANCELLED"
    (worker,) = (span for span in spans if span.service.startswith("worker"))
    assert worker.attributes["treadle.outcome"] == "cancelled"
    assert 0 < input_output(worker)[1] < 3000
    (refused,) = await traces.whole(wrong.trace_id, GENERATE)
    assert (refused.error, refused.attributes["error.type"]) == ("INVALID_FIELD", "INVALID_FIELD")
    assert refused.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"


async def _until_owned(queue: QueueView, request: RequestKeys, num_tokens: int) -> str:
    async def enough() -> bool:
        return await queue.num_tokens(request) >= num_tokens

    await until(enough, f"{request.request_id} has {num_tokens} tokens", 30)
    return await queue.owner(request)


async def _interrupted(
    stub, ask, queue: QueueView, name: str, interrupt: Callable[[str], None]
) -> tuple[Caller, Told, str]:
    """A long answer whose worker meets with something in the middle; that worker."""
    caller = Caller.begin()
    asked = ask(1500, name)
    task = asyncio.create_task(Record().listen(start(stub, asked, caller)))
    victim = await _until_owned(queue, RequestKeys("default", name), 50)
    interrupt(victim)
    return caller, (await task).told(), victim


async def test_after_a_killed_worker_the_next_ones_span_hangs_on_the_same_trace(
    stack, traces, stub, ask, queue
):
    survivors = {name: stack[name].metrics() for name in ("worker-1", "worker-2")}
    caller, told, victim = await _interrupted(stub, ask, queue, "killed-1", lambda name: stack[name].kill())
    (survivor,) = survivors.keys() - {victim}
    name = f"text_completion {stack.model}"
    spans = await traces.whole(caller.trace_id, GENERATE, name, name)
    (generation,) = (span for span in spans if span.name == name and span.service == "gateway-1")
    workers = [span for span in spans if span.service.startswith("worker")]
    assert [span.service for span in workers] == [survivor], "a span that never ended is never told"
    (second,) = workers
    assert second.parent_id == generation.span_id
    assert second.event_names[0] == "takeover"
    assert second.events[0][1]["treadle.delivered_tokens"] >= 50
    assert second.attributes["treadle.epoch"] == 2
    assert input_output(second) == input_output(generation) == (told.prompt_tokens, 1500)
    moved = {
        sample: stack[survivor].metrics()[sample] - survivors[survivor][sample]
        for sample in ("treadle:redeliveries_total", "treadle:request_queue_time_seconds_count")
    }
    assert list(moved.values()) == [1, 0]
    print(f"{victim} was killed, {survivor} went on: {second.events}; {moved}")


async def test_an_engine_that_dies_gives_its_requests_back(stack, traces, stub, ask, queue):
    def kill_engine(name: str) -> None:
        (engine,) = stack[name].children()
        engine.send_signal(signal.SIGKILL)

    before = {name: stack[name].metrics() for name in ("worker-1", "worker-2")}
    caller, told, victim = await _interrupted(stub, ask, queue, "engine-1", kill_engine)
    name = f"text_completion {stack.model}"
    spans = await traces.whole(caller.trace_id, GENERATE, name, name, name)
    first, second = (span for span in spans if span.service.startswith("worker"))
    assert first.service == victim
    assert first.parent_id == second.parent_id
    assert first.attributes["treadle.outcome"] == "handed_back"
    assert 50 <= input_output(first)[1] < 1500 == input_output(second)[1]
    assert second.event_names[0] == "takeover"
    assert told.output_tokens == 1500
    moved = sum(
        stack[name].metrics()["treadle:redeliveries_total"] - before[name]["treadle:redeliveries_total"]
        for name in before
    )
    assert moved == 1

    def restarted() -> bool:
        counts = stack[victim].metrics()
        return counts["treadle:engine_starts_total"] == 2 and counts["treadle:model_ready"] == 1

    await until(restarted, "the engine is counted anew", 60, every_s=0.2)


async def test_preemptions_are_counted_and_told(stack, traces, stub, ask):
    """So few blocks that not all can stay: metrics and spans tell of the same number."""
    few = {"TREADLE_ENGINE_NUM_BLOCKS": "24", "TREADLE_ENGINE_ENABLE_PREFIX_CACHING": "false"}
    with stack.workers(1, few) as (worker,):
        callers = [Caller.begin() for _ in range(6)]
        tasks = [
            asyncio.create_task(Record().listen(start(stub, ask(400, f"few-{number}"), caller)))
            for number, caller in enumerate(callers)
        ]
        waiting = 0.0
        while not all(task.done() for task in tasks):
            waiting = max(waiting, worker.metrics()["treadle:num_requests_waiting"])
            await asyncio.sleep(0.02)
        for task in tasks:
            (await task).told()
        name = f"text_completion {stack.model}"
        spans = [await traces.whole(caller.trace_id, GENERATE, name, name) for caller in callers]
        told = sum(
            span.event_names.count("preemption")
            for trace in spans
            for span in trace
            if span.service == worker.name
        )
        counted = worker.metrics()["treadle:num_preemptions_total"]
    assert told == counted > 0
    assert waiting > 0
    print(f"{counted:.0f} preemptions of 6 requests, {waiting:.0f} at most waited in the engine")


async def test_no_span_says_what_was_said(stack, traces, stub, ask):
    """Of all services, of the tests before, and of this one's errors, in which words of the request stand."""
    caller = Caller.begin()
    wrong = ask(3, profile=SECRET.replace(" ", "-"))
    error = (await Record().listen(start(stub, wrong, caller))).error
    assert error is not None
    told = (await Record().listen(start(stub, ask(8), caller))).told()
    name = f"text_completion {stack.model}"
    await traces.whole(caller.trace_id, GENERATE, GENERATE, name, name, name)
    texts = []
    for service in stack.services.values():
        texts += [str(line) for line in service.log() if "context" in line]
    assert len(texts) > 5
    for word in (SECRET, SECRET.replace(" ", "-"), "wherefore", "Romeo", told.text.strip()):
        assert len(word) > 4
        assert not [text for text in texts if word in text], word
    print(f"{len(texts)} spans of {len(stack.services)} services say nothing")


async def test_a_collector_that_is_away_changes_nothing(stack, ask, tmp_path):
    """A gateway whose spans go nowhere answers as ever, and leaves when it is told to."""
    port, metrics_port, nobody = free_ports(3)
    own = {
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{nobody}",
    }
    gateway = stack.add("gateway-9", f"127.0.0.1:{port}", f"127.0.0.1:{metrics_port}", own)
    try:
        gateway.start()
        gateway.until_ready()
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            answers = await asyncio.gather(
                *(Record().listen(start(stub, ask(5), Caller.begin())) for _ in range(10))
            )
        assert [record.told().output_tokens for record in answers] == [5] * 10
        gateway.signal(signal.SIGTERM)
        left_s = await until(lambda: not gateway.alive, "the gateway has left", 20)
        assert gateway.exit_code == 0
        print(f"10 answers, and it left within {left_s:.1f} s")
    finally:
        if gateway.alive:
            gateway.kill()
        del stack.services["gateway-9"]
