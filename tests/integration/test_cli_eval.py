"""`treadle eval` as a process, against a gateway and a tokenizer whose answers a test can compute."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path

import pytest
from command import Command, ended
from fake_inference import BOS, FakeInference, FakeTokenizer, logprob_of, serving

QUESTIONS = Path(__file__).resolve().parents[2] / "examples" / "data" / "common_knowledge.jsonl"


def nll_of(ids: list[int]) -> float:
    """Over every token but the first: the fake model looks one token back, so windows change nothing."""
    return -math.fsum(logprob_of(*pair) for pair in itertools.pairwise(ids))


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
async def test_perplexity_is_the_texts(tmp_path, bos, rng):
    text = "".join(rng.choice("abcd é🧵\r\n") for _ in range(700))
    (tmp_path / "text.txt").write_text("\ufeff" + text, newline="")  # the mark is none of the text
    ids = list(text.encode())
    inference = FakeInference(losses=[3, 5])
    async with serving(inference, FakeTokenizer(bos=bos)) as address:
        command = Command(tmp_path / "home", address)
        done = await command.run("eval", "perplexity", str(tmp_path / "text.txt"), "--json")
        other = await command.run(
            "eval", "perplexity", str(tmp_path / "text.txt"), "--window", "20", "--stride", "19", "--json"
        )
        cut = await command.run(
            "eval", "perplexity", str(tmp_path / "text.txt"), "--max-tokens", "50", "--json"
        )
        people = await command.run("eval", "perplexity", str(tmp_path / "text.txt"))
    (found,) = done.rows
    whole = [BOS, *ids] if bos else ids
    nll, count = nll_of(whole), len(whole) - 1
    assert (found["tokens"], found["bytes"]) == (count, count)  # a token a byte
    assert found["nll"] == pytest.approx(nll, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / count, rel=1e-12)
    assert (found["window"], found["stride"], found["model"]) == (64, 32, "gpt")
    assert other.rows[0]["nll"] == pytest.approx(nll, rel=1e-12)
    assert cut.rows[0]["tokens"] == 50 - (not bos)
    assert cut.rows[0]["nll"] == pytest.approx(nll_of(whole[: 50 + bos]), rel=1e-12)
    assert f"perplexity     {found['perplexity']:.4f}" in people.stdout
    assert not inference.losses
    print(f"{count} tokens scored once in {len(inference.computed)} windows, nll {nll:.3f}")


@pytest.mark.parametrize(
    ("arguments", "text", "says"),
    [
        (["--window", "65"], "some text", "64 tokens"),
        (["--window", "8", "--stride", "8"], "some text", "stride"),
        (["--model", "minilm"], "some text", "TASK_NOT_SUPPORTED"),
        ([], "", "TEXT_TOO_SHORT"),
        ([], b"\xff", "UTF-8"),
        (["--tokenizer", "127.0.0.1:1"], "some text", "UNAVAILABLE"),
    ],
)
async def test_perplexity_says_what_is_wrong(tmp_path, arguments, text, says):
    (tmp_path / "text.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    async with serving(FakeInference(), FakeTokenizer(bos=False)) as address:
        done = await Command(tmp_path / "home", address).run(
            "eval", "perplexity", str(tmp_path / "text.txt"), *arguments, check=False
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr


async def test_multiple_choice_is_what_the_scores_say(tmp_path):
    out = tmp_path / "answers.jsonl"
    inference = FakeInference(losses=[4])
    async with serving(inference) as address:
        command = Command(tmp_path / "home", address)
        done = await command.run("eval", "multiple-choice", str(QUESTIONS), "--out", str(out), "--json")
        people = await command.run("eval", "multiple-choice", str(QUESTIONS))
    (found,) = done.rows
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    correct = correct_norm = 0
    for row, line in zip(rows, QUESTIONS.read_text().splitlines(), strict=True):
        question = json.loads(line)
        context = list(question["context"].encode())
        totals = [-nll_of([context[-1], *f" {choice}".encode()]) for choice in question["choices"]]
        by_byte = [
            total / len(choice.encode()) for total, choice in zip(totals, question["choices"], strict=True)
        ]
        assert row["logprobs"] == pytest.approx(totals)
        assert row["chosen"] == totals.index(max(totals))
        assert row["chosen_norm"] == by_byte.index(max(by_byte))
        assert (row["correct"], row["correct_norm"]) == (
            row["chosen"] == question["label"],
            row["chosen_norm"] == question["label"],
        )
        correct, correct_norm = correct + row["correct"], correct_norm + row["correct_norm"]
    assert (found["count"], found["failed"]) == (20, 0)
    assert found["accuracy"] == correct / 20
    assert found["accuracy_norm"] == correct_norm / 20
    share = found["accuracy"]
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 19))
    assert f"accuracy       {share:.4f} ±" in people.stdout
    assert inference.sizes.count(4) >= 40
    print(f"{correct} and {correct_norm} of 20 by a model that answers by rule")


async def test_labels_that_do_not_fit_are_told_before_anything_is_sent(tmp_path):
    lines = QUESTIONS.read_text().splitlines()
    lines[7] = lines[7].replace('"label": 3', '"label": 4')
    lines[9] = "no JSON"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    inference = FakeInference()
    async with serving(inference) as address:
        done = await Command(tmp_path / "home", address).run(
            "eval", "multiple-choice", str(tmp_path / "bad.jsonl"), check=False
        )
    assert done.returncode == 1
    assert "line 8: label: labels that do not fit: 4 is none of 4 choices, 0 to 3" in done.stderr
    assert "line 10: no JSON" in done.stderr
    assert inference.num_calls == 0


async def test_a_question_that_fails_alone_is_counted(tmp_path):
    record = {"context": "c", "choices": ["a", "b"], "label": 0}
    bad = record | {"choices": ["a", "BAD"]}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (record, bad, record)))
    out = tmp_path / "out.jsonl"
    async with serving(FakeInference()) as address:
        done = await Command(tmp_path / "home", address).run(
            "eval", "multiple-choice", str(tmp_path / "q.jsonl"), "--json", "--out", str(out), check=False
        )
    assert done.returncode == 1
    assert (done.rows[0]["count"], done.rows[0]["failed"]) == (2, 1)
    assert "1 of 3 questions failed" in done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in row for row in rows] == [False, True, False]


async def test_ctrl_c_ends_an_evaluation(tmp_path):
    (tmp_path / "text.txt").write_text("some text " * 500)
    inference = FakeInference(hold_after=5)
    async with serving(inference) as address:
        process = await Command(tmp_path / "home", address).start(
            "eval", "perplexity", str(tmp_path / "text.txt")
        )
        await inference.held.wait()
        process.send_signal(signal.SIGINT)
        done = await ended(process, check=False)
    assert (done.returncode, done.stdout) == (130, "")
