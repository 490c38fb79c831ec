"""Tables of tasks: what a model's folder says does not steer the terminal."""

from __future__ import annotations

from treadle.cli.task_tables import show_labels, show_spans
from treadle.client import Classifications, LabelScore, TaggedSpan, TaggedTexts

ESCAPE = "joy\x1b]0;owned\x07\x1b[2J"
FACTS = {"model_digest": "sha256:0", "profile": "p-0", "prompt_tokens": 3}


def test_labels_with_escapes_are_harmless(capsys):
    show_labels(["a text"], Classifications(labels=[(LabelScore(ESCAPE, 0.75),)], **FACTS))
    show_spans(["a text"], TaggedTexts(spans=[(TaggedSpan(2, 6, ESCAPE, 0.5),)], **FACTS))
    shown = capsys.readouterr().out
    assert shown.count("joy?]0;owned??[2J") == 2
    assert "\x1b" not in shown
    assert "\x07" not in shown
