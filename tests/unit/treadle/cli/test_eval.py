"""What evaluations compute: windows, perplexity, questions, accuracy."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from treadle.cli.eval_choices import Question, accuracy, read_questions, verdict
from treadle.cli.eval_windows import Surprise, Window, text_pieces, windows
from treadle.errors import InvalidArgument

DATA = Path(__file__).resolve().parents[4] / "examples" / "data"


def test_every_token_but_the_first_is_scored_once(rng):
    tried = 0
    for _ in range(500):
        num_tokens, window = rng.randint(2, 300), rng.randint(2, 80)
        stride = rng.randint(1, window - 1)
        found = list(windows(num_tokens, window, stride))
        scored = [place for one in found for place in range(one.start, one.end)]
        assert scored == list(range(1, num_tokens))
        for place, one in enumerate(found):
            assert one.end - one.begin <= window
            # As much context as the window leaves, and always some.
            assert one.begin == max(0, one.end - window) < one.start
            assert one.end - one.start == stride or place == 0 or one is found[-1]
        tried += len(found)
    print(f"{tried} windows over 500 texts")
    assert tried > 1000


def test_windows_of_an_example():
    assert list(windows(10, 4, 2)) == [Window(0, 1, 4), Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 10)]
    assert list(windows(3, 4, 1)) == [Window(0, 1, 3)]
    assert list(windows(1, 4, 2)) == list(windows(0, 4, 2)) == []
    for window, stride in [(1, 1), (4, 4), (4, 0)]:
        with pytest.raises(InvalidArgument):
            list(windows(10, window, stride))


def test_pieces_are_the_text(rng):
    for _ in range(200):
        text = "".join(rng.choice("ab\né🧵") for _ in range(rng.randint(0, 200)))
        size = rng.randint(4, 50)
        pieces = list(text_pieces(text, size))
        assert "".join(pieces) == text
        assert all(0 < len(piece.encode()) <= size for piece in pieces)
        # Cut at a line's end wherever the piece has one.
        assert all(piece.endswith("\n") or "\n" not in piece for piece in pieces[:-1])


def test_perplexity_is_the_uniform_models():
    uniform = Surprise(tokens=100, nll=100 * math.log(50), num_bytes=300)
    assert uniform.perplexity == pytest.approx(50)
    assert uniform.bits_per_byte == pytest.approx(math.log2(50) / 3)
    assert Surprise(1, 1000.0, 0).perplexity == Surprise(1, 1.0, 0).bits_per_byte == math.inf


def test_accuracy_and_its_error(rng):
    for _ in range(50):
        correct = [rng.random() < 0.6 for _ in range(rng.randint(2, 300))]
        share, error = accuracy(correct)
        assert share == pytest.approx(statistics.mean(correct))
        assert error == pytest.approx(statistics.stdev(correct) / math.sqrt(len(correct)))
    assert accuracy([True]) == (1.0, 0.0)


def test_the_length_of_a_choice_counts_in_bytes():
    question = Question("c", ("no", "a long answer", "né"), 1)
    found = verdict(question, [-4.0, -6.5, -5.0])
    assert (found.chosen, found.chosen_norm) == (0, 1)
    assert (found.correct, found.correct_norm) == (False, True)
    # "né" has three bytes: -5 / 3 is more than -4 / 2, and -5 / 2 would be less.
    assert verdict(Question("c", ("no", "né"), 0), [-4.0, -5.0]).chosen_norm == 1
    assert verdict(Question("c", ("ab", "cd"), 0), [-4.0, -4.0]).chosen == 0


def test_a_separator_stands_behind_a_context_only():
    assert Question("c", ("a", "b"), 0).continuation("a", " ") == " a"
    assert Question("", ("a", "b"), 0).continuation("a", " ") == "a"


GOOD = {"context": "c", "choices": ["a", "b"], "label": 1}


@pytest.mark.parametrize(
    ("line", "field", "says"),
    [
        ("{", "", "no JSON"),
        ("[1]", "", "object"),
        (json.dumps(GOOD | {"label": 2}), "label", "labels that do not fit: 2 is none of 2 choices, 0 to 1"),
        (json.dumps(GOOD | {"label": -1}), "label", "labels that do not fit"),
        (json.dumps(GOOD | {"label": True}), "label", "index"),
        (json.dumps(GOOD | {"label": "b"}), "label", "index"),
        (json.dumps(GOOD | {"choices": []}), "choices", "2 to 64"),
        (json.dumps(GOOD | {"choices": ["a"]}), "choices", "2 to 64"),
        (json.dumps(GOOD | {"choices": ["a", " "]}), "choices[1]", "something in it"),
        (json.dumps({"choices": ["a", "b"], "label": 0}), "context", "string"),
    ],
)
def test_faults_name_line_and_field(tmp_path, line, field, says):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(InvalidArgument) as refused:
        read_questions(path)
    (fault,) = refused.value.fields
    assert fault.field == ("line 3: " + field if field else "line 3")
    assert says in fault.description
    assert refused.value.reason == "EVALUATION_FILE_INVALID"


def test_many_faults_are_told_together(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\xff\n" * 100)
    with pytest.raises(InvalidArgument, match="16 faults at least") as refused:
        read_questions(path)
    assert len(refused.value.fields) == 16
    path.write_text("\n\n")
    with pytest.raises(InvalidArgument, match="no questions"):
        read_questions(path)


def test_the_questions_of_the_examples():
    questions = read_questions(DATA / "common_knowledge.jsonl")
    places = [sum(question.label == place for question in questions) for place in range(4)]
    assert (len(questions), places) == (20, [5, 5, 5, 5])
    assert len({question.context for question in questions}) == 20
    assert len((DATA / "sentences.txt").read_text().splitlines()) == 10
