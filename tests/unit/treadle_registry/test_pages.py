"""Page tokens: what was made here comes back, anything else is refused."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import InvalidArgument
from treadle_registry.pages import LAST, next_token, page_size, read_token


@given(st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True), st.integers(0, LAST))
def test_what_was_made_here_comes_back(name: str, number: int):
    assert read_token(next_token("names", name), "names", "") == name
    assert read_token(next_token("rows", number), "rows", LAST) == number
    assert read_token("", "names", "first") == "first"


def encoded(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "token",
    [
        "??",
        "é",
        encoded("["),
        encoded("[" * 700),
        encoded("[" * 1_000_000),
        encoded(["names"]),
        encoded(["others", "a"]),
        encoded(["names", 1]),
        encoded(["names", "é"]),
        encoded(["names", "\ud800"]),
        encoded({"names": 1, "a": 2}),
        encoded(["rows", "1"]),
        encoded(["rows", -1]),
        encoded(["rows", 1 << 63]),
        encoded(["rows", 10**300]),
        encoded(["rows", True]),
        encoded(["rows", 1.5]),
        "a" * 2_000_000,
    ],
)
def test_others_are_refused(token: str):
    for listing, first in (("names", ""), ("rows", LAST)):
        with pytest.raises(InvalidArgument) as caught:
            read_token(token, listing, first)
        assert [violation.field for violation in caught.value.fields] == ["page_token"]


@given(st.text(min_size=1, max_size=60))
def test_no_text_is_a_token(token: str):
    with pytest.raises(InvalidArgument):
        read_token(token, "names", "")


def test_sizes():
    assert [page_size(asked) for asked in (0, 1, 500, 501, 2**31 - 1)] == [50, 1, 500, 500, 500]
    with pytest.raises(InvalidArgument):
        page_size(-1)
