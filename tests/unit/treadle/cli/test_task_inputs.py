"""Lines out of files: where they end, what they mean, what is wrong with them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from treadle.cli.task_inputs import LineReader, LineSplitter, format_of
from treadle.cli.task_records import queries, scored, single_texts, texts
from treadle.errors import InvalidArgument


def test_lines_are_the_same_however_the_bytes_come(rng):
    for _ in range(200):
        alphabet = [b"a", "é".encode(), b"\n", b"\r\n", b"\r", b"", b"xyz"]
        data = b"".join(rng.choice(alphabet) for _ in range(rng.randint(0, 60)))
        splitter, found, place = LineSplitter(1000), [], 0
        while place < len(data):
            size = rng.randint(1, 7)
            found += splitter.feed(data[place : place + size])
            place += size
        found += splitter.finish()
        expected = data.split(b"\n")
        expected = [line.removesuffix(b"\r") for line in expected[:-1]] + (
            [expected[-1].removesuffix(b"\r")] if expected[-1] else []
        )
        assert found == expected


def test_a_line_that_is_too_long_is_not_kept(rng):
    splitter, found = LineSplitter(10), []
    for piece in [b"short\n", *[b"x" * 7] * 1000, b"\nafter\n", b"y" * 10 + b"\n", b"z" * 11]:
        found += splitter.feed(piece)
        assert len(splitter._rest) <= 10
    found += splitter.finish()
    assert found == [b"short", None, b"after", b"y" * 10, None]


def test_the_format_is_the_extensions_unless_it_is_said():
    assert format_of(Path("a.jsonl"), None) == format_of(Path("a.NDJSON"), None) == "jsonl"
    assert format_of(Path("a.txt"), None) == format_of(None, None) == "text"
    assert format_of(Path("a.jsonl"), "text") == "text"


@pytest.mark.parametrize(
    ("parser", "line", "value"),
    [
        (texts(), '{"text": "a"}', "a"),
        (texts(), '"a"', "a"),
        (texts(), '{"text": "a", "pair": "b", "id": 7}', ("a", "b")),
        (texts(), '{"text": "a", "pair": null}', "a"),
        (scored("c"), '{"continuation": "a"}', ("c", "a")),
        (scored("c"), '{"continuation": "a", "context": ""}', ("", "a")),
        (queries(), '{"query": "q", "documents": ["a", "b"]}', ("q", ("a", "b"))),
    ],
)
def test_records(parser, line, value):
    assert parser.parse(line, "jsonl") == value


@pytest.mark.parametrize(
    ("parser", "line", "field"),
    [
        (texts(), "{", None),
        (texts(), "[1]", None),
        (texts(), "[" * 100_000, None),
        (texts(), "1" * 5000, None),
        (texts(), '{"pair": "b"}', "text"),
        (texts(), '{"text": "a", "pair": 3}', "pair"),
        (single_texts(), '{"text": "a", "pair": "b"}', "pair"),
        (scored(""), '{"context": "b"}', "continuation"),
        (queries(), '{"query": "b"}', "documents"),
        (queries(), '{"query": 1, "documents": []}', "query"),
        (queries(), '{"query": "b", "documents": ["a", 1]}', "documents"),
    ],
)
def test_wrong_records_name_their_field(parser, line, field):
    with pytest.raises(InvalidArgument) as refused:
        parser.parse(line, "jsonl")
    if field is None:
        assert refused.value.reason == "MALFORMED_LINE"
    else:
        assert [one.field for one in refused.value.fields] == [field]


async def test_a_file_is_read_as_it_is_taken(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\ufeff" + "a line of text\n" * 400_000)
    reader = LineReader(path, texts(), "text", 32)
    taken, most = 0, 0
    async for batch in reader.batches():
        if taken == 0:
            assert batch[0].value == "a line of text"
        assert len(batch) <= 32
        assert batch[0].index == taken
        taken += len(batch)
        if taken == 320:
            await asyncio.sleep(0)
            most = reader.read_bytes
    assert taken == 400_000
    assert reader.read_bytes == reader.total_bytes == path.stat().st_size
    assert 0 < most <= 2 * (256 << 10)
    print(f"{taken} lines of {reader.total_bytes} bytes; {most} read when 320 lines were taken")


async def test_a_batch_has_a_megabyte_at_most(tmp_path):
    path = tmp_path / "wide.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 400_000}) + "\n" for _ in range(10)))
    sizes = [len(batch) async for batch in LineReader(path, texts(), "jsonl", 32).batches()]
    assert sum(sizes) == 10
    assert max(sizes) <= 2


async def test_who_stops_taking_ends_the_reading(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a line of text\n" * 400_000)
    reader = LineReader(path, texts(), "text", 32)
    batches = reader.batches()
    await anext(batches)
    await batches.aclose()
    assert reader.read_bytes < path.stat().st_size


def test_what_has_fields_is_no_text(tmp_path):
    with pytest.raises(InvalidArgument, match="jsonl"):
        LineReader(None, queries(), "text", 1)
