"""Entries to chunks: every token once, in order, whatever owners wrote."""

from __future__ import annotations

import random

import pytest

from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import DataLoss, FailedPrecondition
from treadle.queue.log import EntryId, LogEntry
from treadle_gateway.cursor import Cursor
from treadle_gateway.token_stream import Chunk, Failed, TokenStream


def tokens(epoch: int, number: int, index: int, count: int = 1) -> LogEntry:
    ids = range(100 + index, 100 + index + count)
    entry = StreamEntry(tokens={"index": index, "token_ids": ids, "text": f"{index}."})
    return LogEntry(EntryId(epoch, number), entry)


def entry(epoch: int, number: int, **kind) -> LogEntry:
    return LogEntry(EntryId(epoch, number), StreamEntry(**kind))


LOG = [
    entry(0, 1, queued={}),
    entry(1, 0, fence={}),
    entry(1, 1, started={"prompt_tokens": 3}),
    tokens(1, 2, 0),
    tokens(1, 3, 1, 3),
    entry(4, 0, fence={}),
    entry(4, 1, started={"prompt_tokens": 3}),
    tokens(4, 2, 0),
    tokens(4, 3, 1, 3),
    tokens(4, 4, 4, 2),
    tokens(4, 5, 6, 0),
    entry(4, 6, terminal={"finished": {}}),
    entry(5, 0, fence={}),
]


def test_a_takeover_that_says_all_again_is_not_heard():
    stream = TokenStream(Cursor())
    chunks = stream.accept(LOG)
    bodies = [chunk.body for chunk in chunks]
    assert [type(body).__name__ for body in bodies] == ["Started", *["TokenDelta"] * 4, "Finished"]
    assert [list(body.token_ids) for body in bodies[1:5]] == [[100], [101, 102, 103], [104, 105], []]
    assert stream.duplicates == 3


def test_every_cut_and_every_cursor_gives_the_same_chunks():
    rng = random.Random(2)
    whole = TokenStream(Cursor()).accept(LOG)
    resumed = 0
    for _ in range(50):
        stream, chunks, rest = TokenStream(Cursor()), [], LOG
        while rest:
            cut = rng.randint(1, 4)
            # Whoever reads again after a lost reply gets entries twice.
            chunks += stream.accept(rest[:cut] + rest[: rng.randint(0, cut)])
            rest = rest[cut:]
        assert chunks[: len(whole)] == whole
    for place, chunk in enumerate(whole):
        assert isinstance(chunk, Chunk)
        assert TokenStream(chunk.cursor).accept(LOG) == whole[place + 1 :]
        resumed += 1
    assert resumed == 6


def test_a_gap_and_a_mixture_are_faults():
    with pytest.raises(DataLoss, match="token 1 was to come next"):
        TokenStream(Cursor()).accept([tokens(1, 1, 0), tokens(1, 2, 2)])
    with pytest.raises(DataLoss):
        TokenStream(Cursor()).accept([tokens(1, 1, 0, 2), tokens(2, 1, 1, 2)])


def test_an_error_is_the_end():
    stream = TokenStream(Cursor())
    (failed,) = stream.accept([entry(1, 1, terminal={"error": {"code": 1, "message": "x"}}), tokens(2, 1, 0)])
    assert isinstance(failed, Failed)
    assert failed.status.code == 1


def test_a_tasks_log_is_no_stream():
    stream = TokenStream(Cursor())
    assert stream.accept([entry(0, 1, queued={}), entry(1, 0, fence={})]) == []
    with pytest.raises(FailedPrecondition) as caught:
        stream.accept([entry(1, 1, terminal={"task_result": {"data": b"x"}})])
    assert caught.value.reason == "TASK_HAS_NO_STREAM"
