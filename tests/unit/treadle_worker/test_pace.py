"""Few answers are written at once, many in turns, and nobody waits longer than was set."""

from __future__ import annotations

import pytest

from treadle_worker.pace import PER_STREAM_S, Pace


@pytest.mark.parametrize(
    ("streams", "longest_s", "wait_s"), [(1, 0.1, 0.004), (20, 0.1, 0.08), (99, 0.1, 0.1), (99, 0, 0)]
)
def test_the_wait_grows_with_the_answers_up_to_a_bound(streams, longest_s, wait_s):
    pace = Pace(longest_s)
    assert pace.wait_s(streams, 1000.0) == 0, "the first turn is at once"
    pace.turned(1000.0)
    assert pace.wait_s(streams, 1000.0) == pytest.approx(wait_s)
    assert pace.wait_s(streams, 1000.0 + wait_s + 1e-6) == 0


def test_one_answer_is_written_step_by_step():
    pace, step_s, turns = Pace(0.1), 0.01, 0
    for step in range(100):
        if not pace.wait_s(1, step * step_s):
            pace.turned(step * step_s)
            turns += 1
    assert turns == 100
    assert step_s > PER_STREAM_S
    print(f"{turns} turns in 100 steps")
