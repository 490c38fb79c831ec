"""What a lane's entry of a task becomes, and what a held task makes of the engine's answer, without Redis."""

from __future__ import annotations

import pytest

from treadle.api.inference.v1 import generation_pb2
from treadle.api.worker.v1 import queue_pb2
from treadle.api.worker.v1.queue_pb2 import LaneEntry, StreamEntry, TaskWork
from treadle.errors import Cancelled, FailedPrecondition, InvalidArgument
from treadle.queue import codec
from treadle.queue.lanes import Delivery
from treadle.queue.log import EntryId
from treadle_worker.admission import check_task
from treadle_worker.convert_queue import to_job
from treadle_worker.engine_protocol import AddTask, Ready, TaskInput, TaskOutput
from treadle_worker.jobs import TaskJob
from treadle_worker.tasks import RunningTask

PAIR = {"token_ids": [1, 2, 3], "type_ids": [0, 0, 1], "first": 1}
WORKS = {
    "embed": (
        {"embed": {"pooling": "last", "normalize": True, "dimensions": 64}},
        {"pooling": "last", "normalize": True, "dimensions": 64},
    ),
    "classify": ({"classify": {"activation": "softmax"}}, {"activation": "softmax"}),
    "tag": ({"tag": {}}, {}),
    "rank": ({"rank": {"activation": "sigmoid"}}, {"activation": "sigmoid"}),
    "rank by embeddings": (
        {"rank": {"embed": {"pooling": "mean", "normalize": True}}},
        {"pooling": "mean", "normalize": True},
    ),
    "score": ({"score": {}}, {}),
}
ENCODER = Ready(
    max_model_len=8,
    vocab_size=10,
    num_blocks=0,
    block_size=0,
    max_num_seqs=4,
    process_id=1,
    tasks=["embed", "rank"],
    generates=False,
)


def job(**fields) -> TaskJob:
    work = fields.pop("work", {"inputs": [PAIR, PAIR], "embed": {"pooling": "mean"}})
    entry = LaneEntry(tenant="t", request_id="r", task=TaskWork(**work), **fields)
    found = to_job(codec.encode(entry))
    assert isinstance(found, TaskJob)
    return found


def running(found: TaskJob | None = None) -> RunningTask:
    delivery = Delivery("lane", "1-0", b"")
    return RunningTask(found or job(), delivery, 2, last=EntryId(0, 1), watchers={"g"})


@pytest.mark.parametrize(("work", "wanted"), WORKS.values(), ids=WORKS)
def test_every_task_reaches_the_engine_as_it_was_asked_for(work, wanted):
    found = job(
        work={"inputs": [PAIR, {"token_ids": [4]}], **work},
        priority=generation_pb2.PRIORITY_HIGH,
        adapter="a",
        timeout_ms=5,
        retention_ms=7,
        artifact_digest="sha256:a",
        profile="p",
        traceparent="tp",
        disconnect_mode=generation_pb2.DISCONNECT_MODE_DETACH,
    )
    (kind,) = work
    inputs = [TaskInput(token_ids=[1, 2, 3], type_ids=[0, 0, 1], first=1), TaskInput(token_ids=[4])]
    command = running(found).start()
    assert command == AddTask(
        request_id="t:r@2", task=kind, inputs=inputs, priority=1, cache_salt="t/a", **wanted
    )
    assert (found.timeout_ms, found.retention_ms, found.detaches) == (5, 7, True)
    assert (found.artifact_digest, found.profile, found.traceparent) == ("sha256:a", "p", "tp")
    assert found.num_tokens == 4


def test_an_answer_is_one_entry_with_news_of_itself():
    request = running(job(artifact_digest="sha256:a", profile="p"))
    assert (request.outgoing(), request.has_more, request.may_gather) == (None, False, False)
    assert request.num_tokens == request.num_input_tokens == 6
    request.accept(TaskOutput(request_id="t:r@2", data=b"1234"))
    assert request.num_tokens == 0
    outgoing = request.outgoing()
    assert outgoing.is_terminal
    assert request.outgoing() is outgoing
    entry = codec.decode(StreamEntry, outgoing.data)
    result = entry.terminal.task_result
    assert (result.data, result.artifact_digest, result.profile) == (b"1234", "sha256:a", "p")
    news = queue_pb2.News.FromString(request.written())
    assert (news.epoch, news.number, news.previous_epoch, news.previous_number) == (2, 1, 0, 1)
    assert entry.version == 2


def test_an_end_that_was_decided_stays():
    request = running()
    request.fail(Cancelled("asked"))
    request.accept(TaskOutput(request_id="t:r@2", data=b"1234"))
    assert codec.decode(StreamEntry, request.outgoing().data).terminal.error.message == "asked"
    request = running()
    request.accept(TaskOutput(request_id="t:r@2", data=b"1234"))
    request.fail(Cancelled("asked"))
    assert codec.decode(StreamEntry, request.outgoing().data).terminal.task_result.data == b"1234"


def test_what_this_engine_cannot_do_is_refused_by_name():
    assert running().refusal(ENCODER) is None
    error = running(job(work={"inputs": [PAIR], "tag": {}})).refusal(ENCODER)
    assert isinstance(error, FailedPrecondition)
    assert (error.reason, error.message) == (
        "TASK_NOT_SUPPORTED",
        "the model cannot tag; it can: embed, rerank",
    )


EMBED = {"embed": {"pooling": "mean"}}
BAD = {
    "inputs: 0": {"inputs": [], **EMBED},
    "inputs[1]: it is empty": {"inputs": [PAIR, {}], **EMBED},
    "inputs[0]: 9 tokens are more than the 8": {"inputs": [{"token_ids": [1] * 9}], **EMBED},
    "inputs[0]: a token id": {"inputs": [{"token_ids": [10]}], **EMBED},
    "inputs[0]: 1 type ids for 2": {"inputs": [{"token_ids": [1, 2], "type_ids": [1]}], **EMBED},
    "inputs[0]: first: 1": {"inputs": [{"token_ids": [1], "first": 1}], **EMBED},
    "pooling: ''": {"inputs": [PAIR], "embed": {}},
    "pooling: 'max'": {"inputs": [PAIR, PAIR], "rank": {"embed": {"pooling": "max"}}},
    "activation: 'relu'": {"inputs": [PAIR], "rank": {"activation": "relu"}},
    "inputs: 1 where at least 2": {"inputs": [PAIR], "rank": {"embed": {"pooling": "mean"}}},
}


@pytest.mark.parametrize(("said", "work"), BAD.items(), ids=BAD)
def test_what_no_engine_may_be_given_is_refused_with_the_way_out(said, work):
    error = running(job(work=work)).refusal(ENCODER)
    assert isinstance(error, InvalidArgument)
    assert error.reason == "TASK_REFUSED"
    assert error.message.startswith(said)


def test_an_engine_that_knows_its_types_refuses_others():
    task = running(job(work={"inputs": [PAIR], **EMBED})).start()
    assert check_task(task, 10, 8, type_vocab_size=2) is None
    assert check_task(task, 10, 8, type_vocab_size=1) == "inputs[0]: a type id lies outside the model's 1"
