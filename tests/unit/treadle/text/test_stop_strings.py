"""The matcher against a search that knows the whole text, however the text is cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.text import stop_strings as module
from treadle.text.stop_strings import StopStringMatcher


def oracle(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The first end of any stop string; there, the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def cut(text: str, seed: int) -> list[str]:
    rng, pieces, at = random.Random(seed), [], 0
    while at < len(text):
        size = rng.choice((1, 1, 2, 3, 8))
        pieces.append(text[at : at + size])
        at += size
    return pieces


few_letters = st.text(alphabet="ab", max_size=40)
stop = st.text(alphabet="ab", min_size=1, max_size=5) | st.text(alphabet="ab\n👍", min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    text=few_letters | st.text(alphabet="ab\n👍", max_size=40),
    stops=st.lists(stop, max_size=5),
    include=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_search(text: str, stops: list[str], include: bool, seed: int) -> None:
    matcher = StopStringMatcher(stops, include_stop_string=include)
    given_out = ""
    for piece in cut(text, seed):
        given_out += matcher.push(piece)
    given_out += matcher.flush()
    assert (given_out, matcher.matched) == oracle(text, stops, include=include)


@settings(max_examples=120, deadline=None)
@given(text=few_letters, stops=st.lists(stop, min_size=1, max_size=4))
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    given_out = ""
    for position, character in enumerate(text, start=1):
        given_out += matcher.push(character)
        if matcher.matched is not None:
            return
        seen = text[:position]
        beginnings = [stop[:size] for stop in stops for size in range(len(stop))]
        held = max((start for start in beginnings if seen.endswith(start)), key=len)
        assert given_out + held == seen


@settings(max_examples=120, deadline=None)
@given(
    text=few_letters,
    stops=st.lists(stop, min_size=1, max_size=4),
    quiet=st.integers(0, 20),
    include=st.booleans(),
)
def test_no_match_before_it_may(text: str, stops: list[str], quiet: int, include: bool) -> None:
    matcher = StopStringMatcher(stops, include_stop_string=include)
    given_out = matcher.push(text[:quiet], may_match=False) + matcher.push(text[quiet:]) + matcher.flush()
    for end in range(quiet + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            found = max(ending, key=len)
            assert matcher.matched == found
            assert given_out == text[: end if include else end - len(found)]
            return
    assert matcher.matched is None
    assert given_out == text


@pytest.mark.parametrize(
    ("stops", "text", "expected", "matched"),
    [
        (["abcd", "bc"], "xabcd", "xa", "bc"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["\n\nHuman:"], "hi\n\nHuman: no", "hi", "\n\nHuman:"),
        (["\n\nHuman:"], "hi\n\nHum", "hi\n\nHum", None),
        ([], "anything", "anything", None),
    ],
)
def test_which_match_counts(stops: list[str], text: str, expected: str, matched: str | None) -> None:
    matcher = StopStringMatcher(stops)
    assert "".join([*map(matcher.push, text), matcher.flush()]) == expected
    assert matcher.matched == matched


def test_after_a_match_nothing_comes() -> None:
    matcher = StopStringMatcher(["END"], include_stop_string=True)
    assert matcher.push("one END two") == "one END"
    assert matcher.push("three") == ""
    assert matcher.flush() == ""


def test_empty_stop_string() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringMatcher(["ok", ""])


def test_hostile_stop_strings_cost_linear_work() -> None:
    """Counts look-ups in the automaton: a few a character, whatever nearly matches."""
    looks = 0

    class Counting(dict[str, int]):
        def __contains__(self, key: object) -> bool:
            nonlocal looks
            looks += 1
            return super().__contains__(key)

    matcher = StopStringMatcher(["a" * 2000 + "b", "a" * 1000 + "c", "aab" * 500 + "d"])
    automaton: module._Automaton = matcher._automaton
    automaton._next[:] = [Counting(edges) for edges in automaton._next]
    text = "a" * 20_000 + "x" + "aab" * 3_000 + "x" + "ab" * 3_000
    out = "".join([*map(matcher.push, cut(text, 3)), matcher.flush()])
    print(f"{looks} look-ups for {len(text)} characters")
    assert len(text) < looks <= 2 * len(text)
    assert out == text
    assert matcher.matched is None
