"""The commands of the tasks as processes, against a gateway that answers by rule."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from command import Command, ended
from cutting_proxy import CuttingProxy
from fake_inference import FakeInference, logprob_of, positive, serving, vector_of
from waiting import until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"


@pytest.fixture
async def inference() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def command(inference: FakeInference, tmp_path: Path) -> AsyncIterator[Command]:
    async with serving(inference) as address:
        yield Command(tmp_path / "home", address)


async def test_each_task_of_arguments(command):
    embedded = (await command.run("embed", "A loom", "a thread", "--with-text")).rows
    assert [row["embedding"] for row in embedded] == [
        pytest.approx(vector_of(text), abs=1e-8) for text in ("A loom", "a thread")
    ]
    assert [(row["index"], row["text"]) for row in embedded] == [(0, "A loom"), (1, "a thread")]
    (classified,) = (await command.run("classify", "A", "--pair", "b", "--top-k", "1")).rows
    assert classified["labels"][0]["score"] == pytest.approx(max(positive("Ab"), 1 - positive("Ab")))
    (tagged,) = (await command.run("tag", "in Rome")).rows
    assert tagged == {"index": 0, "spans": [{"start": 3, "end": 7, "label": "NAME", "score": 0.75}]}
    (ranked,) = (await command.run("rerank", "a b", "b", "a b c", "--top-n", "1")).rows
    assert ranked == {"index": 0, "documents": [{"index": 1, "score": 2.0}]}
    (scored,) = (await command.run("score", "bc", "--context", "a", "--tokens")).rows
    assert scored["logprobs"] == [logprob_of(97, 98), logprob_of(98, 99)]
    assert scored["logprob"] == sum(scored["logprobs"])


async def test_a_file_with_bad_lines_in_the_middle(command, inference, tmp_path, rng):
    kinds = [rng.choice(["good", "good", "good", "BAD", ""]) for _ in range(500)]
    lines = [f"{kind} {number}" if kind else "" for number, kind in enumerate(kinds)]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    done = await command.run("embed", "-f", str(tmp_path / "lines.txt"), "-o", str(out), check=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(500))
    for row, line in zip(rows, lines, strict=True):
        if "good" in line:
            assert row["embedding"] == pytest.approx(vector_of(line), abs=1e-8)
        else:
            assert (row["error"]["code"], row["error"]["fields"][0]["field"]) == (
                "INVALID_ARGUMENT",
                "inputs[0].text",
            )
    failed = sum("error" in row for row in rows)
    assert done.returncode == 1
    assert f"500 lines, {failed} failed" in done.stderr
    assert failed > 50
    assert max(inference.sizes) == 32
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.jsonl"]
    print(f"{500 - failed} answered, {failed} failed alone, {len(inference.sizes)} requests")


async def test_jsonl_from_standard_input(command):
    records = [
        '{"text": "first", "pair": "second"}',
        '{"text": 7}',
        "no JSON",
        '"a string"',
        '{"text": "half \\ud800"}',
        '{"other": "x"}',
    ]
    done = await command.run(
        "classify", "-", "--format", "jsonl", "--with-text", text="\n".join(records), check=False
    )
    assert done.returncode == 1
    rows = done.rows
    assert [row["index"] for row in rows] == list(range(6))
    assert rows[0]["pair"] == "second"
    assert {one["label"]: one["score"] for one in rows[0]["labels"]}["POSITIVE"] == positive("firstsecond")
    assert rows[3]["text"] == "a string"
    errors = {row["index"]: row["error"] for row in rows if "error" in row}
    assert sorted(errors) == [1, 2, 4, 5]
    assert errors[2]["reason"] == "MALFORMED_LINE"
    assert [errors[index]["fields"][0]["field"] for index in (1, 5)] == ["text", "text"]
    assert "4 failed" in done.stderr


async def test_a_pair_has_no_vector(command, inference):
    done = await command.run(
        "embed", "-", "--format", "jsonl", text='{"text": "a", "pair": "b"}\n{"text": "a"}\n', check=False
    )
    assert done.rows[0]["error"]["fields"][0]["field"] == "pair"
    assert done.rows[1]["embedding"] == pytest.approx(vector_of("a"), abs=1e-8)
    assert inference.sizes == [1]


async def test_rerank_and_score_of_files(command, tmp_path):
    queries = [{"query": "a", "documents": ["b", "a"]}, {"query": "a", "documents": "a"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    ranked = await command.run("rerank", "--file", str(tmp_path / "q.jsonl"), check=False)
    assert ranked.rows[0]["documents"][0] == {"index": 1, "score": 1.0}
    assert ranked.rows[1]["error"]["fields"][0]["field"] == "documents"
    pairs = [{"context": "a", "continuation": "b"}, {"continuation": "b"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    scored = (await command.run("score", "--file", str(tmp_path / "p.jsonl"), "--context", "z")).rows
    assert [row["logprob"] for row in scored] == [logprob_of(97, 98), logprob_of(122, 98)]


async def test_a_million_bytes_of_garbage_and_a_long_line(command, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"good\n" + b"\xff\n" * 5000 + b"x" * (9 << 20) + b"\r\nlast\r\n")
    done = await command.run("embed", "--file", str(tmp_path / "x.txt"), check=False)
    assert len(done.rows) == 5003
    assert [row["index"] for row in done.rows] == list(range(5003))
    assert done.rows[-1]["embedding"] == pytest.approx(vector_of("last"), abs=1e-8)
    assert done.rows[-2]["error"]["reason"] == "LINE_TOO_LONG"
    assert done.rows[1]["error"]["reason"] == "MALFORMED_LINE"
    assert "5001 failed" in done.stderr


async def test_a_gateway_that_is_full_or_goes_away_costs_no_line(command, inference, tmp_path, rng):
    inference.num_full = 3
    inference.losses = [rng.randint(0, 6) for _ in range(4)]
    lines = [f"FULL {number}" for number in range(1000)]
    (tmp_path / "x.txt").write_text("\n".join(lines) + "\n")
    done = await command.run("embed", "--file", str(tmp_path / "x.txt"))
    assert [row["index"] for row in done.rows] == list(range(1000))
    assert "1000 lines, 2000 tokens" in done.stderr
    assert inference.num_full == 0
    assert not inference.losses
    # A refused request, and one that was cancelled with its call, comes again under an id of its own.
    assert inference.cancelled
    assert sum(inference.computed.values()) >= 32 + 3


async def test_a_cut_connection_costs_no_line(command, inference, tmp_path):
    lines = [f"text {number}" for number in range(2000)]
    (tmp_path / "x.txt").write_text("\n".join(lines) + "\n")
    async with CuttingProxy(
        int(command.address.rpartition(":")[2]), [2, 9000, 9000, 9000]
    ).running() as proxy:
        # The first connection is the look whether anybody is there.
        proxied = Command(command.home, f"127.0.0.1:{proxy.port}")
        proxy._cuts[0] = 1 << 30
        done = await proxied.run("embed", "--file", str(tmp_path / "x.txt"), "--model", "minilm")
    assert proxy.num_cut >= 2
    assert [row["index"] for row in done.rows] == list(range(2000))
    assert [row["embedding"] for row in done.rows[::97]] == [
        pytest.approx(vector_of(line), abs=1e-8) for line in lines[::97]
    ]
    assert len(inference.computed) == 63
    print(f"cut {proxy.num_cut} times, {sum(inference.computed.values())} of 63 requests computed")


async def test_ctrl_c_ends_it_and_leaves_no_half_a_file(command, inference, tmp_path):
    inference.hold_after = 5
    (tmp_path / "x.txt").write_text("\n".join(f"text {number}" for number in range(5000)))
    out = tmp_path / "out.jsonl"
    out.write_text("of before\n")
    process = await command.start("embed", "--file", str(tmp_path / "x.txt"), "--out", str(out))
    await asyncio.wait_for(inference.held.wait(), 60)
    process.send_signal(signal.SIGINT)
    done = await ended(process, check=False)
    assert done.returncode == 130, done.stderr
    assert out.read_text() == "of before\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "x.txt"]


async def test_ctrl_c_while_it_waits_for_input(command, inference):
    process = await command.start("embed", "-", stdin=asyncio.subprocess.PIPE)
    process.stdin.write(b"one\n")
    row = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
    assert row["index"] == 0  # before the input's end: who writes slowly is answered at once
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(30):
        assert await process.wait() == 130
    said = (await process.stderr.read()).decode()
    assert "Traceback" not in said
    assert "Fatal" not in said
    process.stdin.close()


async def test_a_reader_that_has_enough(command, tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(f"text {number}" for number in range(20_000)))
    process = await command.start("embed", "--file", str(tmp_path / "x.txt"))
    assert (await process.stdout.readline()).startswith(b'{"index": 0')
    process._transport.get_pipe_transport(1).close()
    said = (await process.stderr.read()).decode()
    assert await process.wait() == 1, said
    assert said == ""


async def test_out_that_is_no_plain_file(command, tmp_path):
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    pipe, target, link = tmp_path / "pipe", tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    os.mkfifo(pipe)
    target.write_text("of before\n")
    link.symlink_to(target.name)
    reading = asyncio.create_task(asyncio.to_thread(pipe.read_text))
    await command.run("embed", "--file", str(tmp_path / "x.txt"), "--out", str(pipe))
    assert len((await asyncio.wait_for(reading, 60)).splitlines()) == 2
    assert pipe.is_fifo()  # and not a file that took its place, as it once did of /dev/null
    await command.run("embed", "--file", str(tmp_path / "x.txt"), "--out", str(link))
    assert link.is_symlink()
    assert len(target.read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "pipe", "target.jsonl", "x.txt"]


@pytest.mark.parametrize("out", ["folder", "nowhere/out.jsonl"])
async def test_out_is_looked_at_before_anything_is_asked(command, inference, tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.txt").write_text("one\n")
    done = await command.run(
        "embed", "--file", str(tmp_path / "x.txt"), "--out", str(tmp_path / out), check=False
    )
    assert done.returncode == 1
    assert "error: out: " in done.stderr
    assert ".part" not in done.stderr
    assert inference.sizes == []


async def test_utf_16_is_told_instead_of_computed(command, inference, tmp_path):
    (tmp_path / "x.txt").write_bytes("one\ntwo\n".encode("utf-16"))
    done = await command.run("embed", "--file", str(tmp_path / "x.txt"), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "UTF-16" in done.stderr
    assert inference.sizes == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["embed"], 2, "--file"),
        (["embed", "--file", "/"], 1, "/ is a folder"),
        (["embed", "x", "--file", "y"], 2, "not both"),
        (["embed", "--file", "/nowhere/x.txt"], 1, "/nowhere/x.txt"),
        (["embed", "x", "--pooling", "sum"], 2, "mean"),
        (["embed", "x", "--model", "sst"], 1, "TASK_NOT_SUPPORTED"),
        (["embed", ""], 1, "inputs[0].text"),
        (["classify", "a", "b", "--pair", "c"], 1, "pair"),
        (["rerank", "query"], 1, "documents"),
        (["score", "x", "--address", "127.0.0.1:1"], 1, "UNAVAILABLE"),
    ],
)
async def test_wrong_calls_say_what_is_right(command, arguments, code, says):
    done = await command.run(*arguments, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr


async def test_what_is_no_lines_fault_ends_the_whole(command, inference, tmp_path):
    (tmp_path / "x.txt").write_text("one\n" * 5000)
    out = tmp_path / "out.jsonl"
    done = await command.run(
        "classify", "-f", str(tmp_path / "x.txt"), "-o", str(out), "--model", "ner", check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("TASK_NOT_SUPPORTED") == 1
    assert not out.exists()
    assert len(inference.sizes) < 200


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["embed", "A loom", "a thread"], ["8 dimensions, length 1.000", "cosine to the first"]),
        (["classify", "A loom"], ["%  ", "POSITIVE", "NEGATIVE"]),
        (["tag", "in Rome"], ["NAME", "75.0%", "Rome"]),
        (["rerank", "a", "b", "a"], ["1.0000  a"]),
        (["score", "bc", "--context", "a"], ["log-probability", "over 2 tokens"]),
        (["score", "bc", "--context", "a", "--json"], ['"num_tokens": 2']),
    ],
)
async def test_people_see_it_in_their_terminal(command, arguments, shows):
    keyboard, terminal = pty.openpty()
    process = await command.start(*arguments, stdout=terminal, environment={"TERM": "dumb"})
    os.close(terminal)
    seen = b""

    def read() -> None:
        nonlocal seen
        try:
            while data := os.read(keyboard, 4096):
                seen += data
        except OSError:  # the other side is closed
            return

    await asyncio.gather(asyncio.to_thread(read), process.wait())
    os.close(keyboard)
    said = (await process.stderr.read()).decode()
    assert process.returncode == 0, said
    for text in shows:
        assert text in seen.decode(), seen.decode()


@pytest.mark.parametrize(
    ("name", "says"), [("embed.py", "10 vectors of 8"), ("classify.py", "INVALID_ARGUMENT")]
)
async def test_the_examples_run(command, name, says):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / name),
        command.address,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    done = await ended(process)
    assert says in done.stdout
    assert len(done.stdout.splitlines()) in (4, 5)


async def test_a_bar_is_shown_where_there_is_a_terminal(command, inference, tmp_path):
    inference.hold_after = 10
    (tmp_path / "x.txt").write_text("\n".join(f"text {number}" for number in range(1000)))
    keyboard, terminal = pty.openpty()
    process = await command.start(
        "embed", "--file", str(tmp_path / "x.txt"), stderr=terminal, environment={"TERM": "xterm"}
    )
    os.close(terminal)
    rows = asyncio.create_task(process.stdout.read())
    os.set_blocking(keyboard, False)
    seen = b""

    def bar() -> bool:
        nonlocal seen
        try:
            seen += os.read(keyboard, 65536)
        except OSError:
            return False
        return b"lines/s" in seen

    await until(bar, "a bar")
    inference.released.set()
    assert len((await rows).splitlines()) == 1000
    assert await process.wait() == 0
    os.close(keyboard)
