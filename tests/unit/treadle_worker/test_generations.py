"""What a generation makes of the engine's outputs, without Redis."""

from __future__ import annotations

import random

import msgspec
import pytest
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from treadle.api.worker.v1 import queue_pb2
from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import DeadlineExceeded
from treadle.queue import codec
from treadle.queue.keys import RequestKeys
from treadle.queue.lanes import Delivery
from treadle.queue.log import EntryId
from treadle.text.tokenizer import Tokenizer
from treadle_worker.engine_protocol import Ready, SamplingParams, SequenceOutput, TokenLogprobs
from treadle_worker.generations import RunningGeneration
from treadle_worker.jobs import GenerationJob, History
from treadle_worker.requests import RequestTable

ALPHABET = sorted(ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(BPE({character: place for place, character in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return Tokenizer(backend)


@pytest.fixture
def make(tokenizer: Tokenizer):
    def running(history: History | None = None, *, epoch: int = 1, **fields) -> RunningGeneration:
        sampling = SamplingParams(max_new_tokens=50, **fields.pop("sampling", {}))
        job = GenerationJob(
            request=RequestKeys("t", "r"), prompt_token_ids=(1, 2, 3), sampling=sampling, **fields
        )
        delivery = Delivery("lane", "1-0", b"")
        return RunningGeneration(
            job, delivery, epoch, tokenizer=tokenizer, history=history or History(), watchers={"g"}
        )

    return running


def drained(request: RunningGeneration) -> list[StreamEntry]:
    """Everything there is to write, as if each write arrived at once."""
    entries = []
    while (outgoing := request.outgoing()) is not None:
        assert request.outgoing() is outgoing
        entries.append(codec.decode(StreamEntry, outgoing.data))
        assert outgoing.number == len(entries)
        assert outgoing.is_terminal == entries[-1].HasField("terminal")
        request.written()
        if outgoing.is_terminal:
            break
    return entries


def step(request: RunningGeneration, index: int, ids: list[int], **fields) -> bool:
    return request.accept(
        SequenceOutput(request_id=request.engine_id, first_index=index, token_ids=ids, **fields)
    )


def kinds(entries) -> list[str]:
    return [entry.WhichOneof("entry") for entry in entries]


def test_tokens_gather_while_an_entry_is_on_its_way(make, tokenizer):
    request = make()
    ids = tokenizer.encode("hello world")
    step(request, 0, ids[:1], num_cached_tokens=2)
    started = request.outgoing()
    for place in range(1, len(ids)):
        step(request, place, ids[place : place + 1])
    assert request.outgoing() is started
    request.written()
    entry = codec.decode(StreamEntry, request.outgoing().data)
    assert (entry.tokens.index, list(entry.tokens.token_ids), entry.tokens.text) == (0, ids, "hello world")


def test_the_order_is_started_tokens_end(make, tokenizer):
    request = make()
    ids = tokenizer.encode("ab")
    step(request, 0, ids, finish_reason="length", num_cached_tokens=2)
    entries = drained(request)
    assert kinds(entries) == ["started", "tokens", "terminal"]
    assert entries[0].started.cached_tokens == 2
    assert entries[2].terminal.finished.usage.output_tokens == 2


def test_a_stop_string_keeps_the_ids_up_to_it_and_asks_for_an_abort(make, tokenizer):
    request = make(stop_strings=("cd",))
    ids = tokenizer.encode("abcdef")
    logprobs = [TokenLogprobs(logprob=-float(place)) for place in range(6)]
    assert step(request, 0, ids, logprobs=logprobs)
    assert not step(request, 6, ids)
    entries = drained(request)
    assert entries[1].tokens.text == "ab"
    assert list(entries[1].tokens.token_ids) == ids[:4]
    assert [one.logprob for one in entries[1].tokens.logprobs] == [0, -1, -2, -3]
    assert entries[2].terminal.finished.choices[0].stop_string == "cd"


@pytest.mark.parametrize("cut", range(1, 9))
def test_going_on_after_any_number_of_delivered_tokens_gives_the_same_text(make, tokenizer, cut: int):
    ids = tokenizer.encode("zé x-en")
    assert len(ids) == 8
    first = make(stop_strings=("-end",))
    step(first, 0, ids[:cut])
    before = "".join(entry.tokens.text for entry in drained(first))
    second = make(History(True, 5, ids[:cut]), epoch=2, stop_strings=("-end",))
    command = second.start()
    assert command.output_token_ids == ids[:cut]
    step(second, cut, ids[cut:], finish_reason="length")
    entries = drained(second)
    assert "started" not in kinds(entries)
    assert before + "".join(entry.tokens.text for entry in entries) == "zé x-en"
    assert entries[-1].terminal.finished.usage.cached_tokens == 5
    assert entries[-1].terminal.finished.usage.output_tokens == 8


def test_a_stop_string_among_the_delivered_tokens_ends_it_without_the_engine(make, tokenizer):
    request = make(History(True, 0, tokenizer.encode("abcd")), stop_strings=("cd",))
    assert request.start() is None
    assert kinds(drained(request)) == ["terminal"]


def test_a_delivered_stop_token_adds_no_text_at_the_end(make, tokenizer):
    ids = tokenizer.encode("ab")
    request = make(History(True, 0, ids), sampling={"stop_token_ids": (ids[-1],)})
    assert request.start() is not None
    step(request, 2, [], finish_reason="stop_token", stop_token_id=ids[-1])
    (end,) = drained(request)
    assert end.terminal.finished.choices[0].stop_token_id == ids[-1]


def test_an_error_drops_what_was_not_written_and_comes_alone(make, tokenizer):
    request = make()
    step(request, 0, tokenizer.encode("ab"))
    request.fail(DeadlineExceeded("late"))
    request.fail(DeadlineExceeded("again"))
    (end,) = drained(request)
    assert end.terminal.error.message == "late"


def test_a_gap_in_the_engines_outputs_is_an_error(make, tokenizer):
    request = make()
    assert step(request, 3, [1])
    (end,) = drained(request)
    assert "token 0" in end.terminal.error.message


def test_an_engine_that_does_not_generate_is_no_place_for_it(make):
    sizes = {"max_model_len": 8, "vocab_size": 9, "num_blocks": 0, "block_size": 0, "max_num_seqs": 1}
    ready = Ready(**sizes, process_id=1, tasks=["embed", "rank"], generates=False)
    error = make().refusal(ready)
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TASK_NOT_SUPPORTED")
    assert error.message == "the model cannot generate; it can: embed, rerank"
    assert make().refusal(msgspec.structs.replace(ready, generates=True)) is None


def test_the_table_knows_a_request_by_every_name(make):
    table, request = RequestTable(), make()
    table.add(request)
    assert table.by_engine_id("t:r@1") is table.by_keys(request.keys) is request
    assert table.entry_ids == {("lane", "1-0")}
    table.remove(request)
    table.remove(request)
    assert len(table) == 0


@pytest.mark.parametrize("minimum", [0, 9])
@pytest.mark.parametrize("fields", [{}, {"stop_strings": ("lo w",)}, {"stop_strings": ("zz",)}], ids=str)
@pytest.mark.parametrize("reason", ["length", "stop_token"])
def test_several_tokens_a_step_are_what_they_are_one_by_one(make, tokenizer, minimum, fields, reason):
    """Wherever steps cut the answer: text, ids, log-probabilities and end."""
    ids = tokenizer.encode("hello wörld lo w")
    stop = {"stop_token_id": ids[-1]} if reason == "stop_token" else {}

    def answer(cuts: set[int]) -> tuple[object, ...]:
        request = make(sampling={"min_new_tokens": minimum}, **fields)
        ends = sorted({*cuts, len(ids)})
        for first, end in zip([0, *ends], ends, strict=False):
            logprobs = [TokenLogprobs(logprob=-float(place)) for place in range(first, end)]
            last = {"finish_reason": reason, **stop} if end == len(ids) else {}
            if step(request, first, ids[first:end], logprobs=logprobs, **last):
                break
        entries = drained(request)
        said = [entry.tokens for entry in entries if entry.HasField("tokens")]
        return (
            [token for part in said for token in part.token_ids],
            "".join(part.text for part in said),
            [one.logprob for part in said for one in part.logprobs],
            entries[-1],
        )

    one_by_one = answer(set(range(1, len(ids))))
    rng = random.Random(3)
    for _ in range(30):
        assert answer(set(rng.sample(range(1, len(ids)), rng.randrange(8)))) == one_by_one
    stopped = fields.get("stop_strings") == ("lo w",)
    print(one_by_one[1])
    assert (len(one_by_one[0]) < len(ids)) == (stopped and minimum == 0)


def test_only_more_of_an_answer_that_flows_may_gather(make, tokenizer):
    request = make()
    ids = tokenizer.encode("hello world")
    assert not request.has_more
    step(request, 0, ids[:1], num_cached_tokens=0)
    gathered = []
    for place in range(1, 8):
        while request.has_more and not request.may_gather:
            request.outgoing()
            request.written()
        step(request, place, ids[place : place + 1])
        gathered.append(request.may_gather)
    assert gathered == [True] * 7
    step(request, 8, ids[8:9], finish_reason="length")
    assert not request.may_gather, "an end waits for nothing"
    assert kinds(drained_on(request)) == ["tokens", "terminal"]
    again = make(History(True, 0, ids[:4]), epoch=2)
    step(again, 4, ids[4:5])
    assert again.has_more
    assert not again.may_gather, "the first tokens after a takeover are waited for"


def drained_on(request: RunningGeneration) -> list[StreamEntry]:
    entries = []
    while not entries or not entries[-1].HasField("terminal"):
        entries.append(codec.decode(StreamEntry, request.outgoing().data))
        request.written()
    return entries


def test_news_say_what_was_written_and_what_came_before_it(make, tokenizer):
    ids = tokenizer.encode("hello")
    request = make(History(True, 0, ids[:2], last=EntryId(1, 5)), epoch=3)
    said = []
    for place in range(2, 5):
        step(request, place, ids[place : place + 1])
        request.outgoing()
        said.append(queue_pb2.News.FromString(request.written()))
    assert [(news.epoch, news.number) for news in said] == [(3, 1), (3, 2), (3, 3)]
    assert [(news.previous_epoch, news.previous_number) for news in said] == [(1, 5), (3, 1), (3, 2)]
    texts = [codec.decode(StreamEntry, news.entry).tokens.text for news in said]
    assert texts == ["l", "l", "o"]
