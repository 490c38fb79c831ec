"""Cursors: whole ones come back, everything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import InvalidArgument
from treadle.queue.keys import RequestKeys
from treadle.queue.log import EntryId
from treadle_gateway.cursor import Cursor

REQUEST = RequestKeys("default", "r1")
numbers = st.integers(0, 2**64 - 1)
cursors = st.builds(Cursor, st.builds(EntryId, numbers, numbers), numbers)


@given(cursors)
def test_a_cursor_comes_back(cursor):
    text = cursor.encode(REQUEST)
    assert Cursor.decode(text, REQUEST) == cursor
    assert text.isascii()
    assert "=" not in text


def test_no_cursor_is_the_beginning():
    assert Cursor.decode("", REQUEST) == Cursor()


@given(cursors, st.integers(0, 43), st.sampled_from("AZaz09-_=+/ \u00e9\x00"))
def test_a_mangled_cursor_is_refused(cursor, place, letter):
    text = cursor.encode(REQUEST)
    mangled = text[:place] + letter + text[place + 1 :]
    if mangled != text:
        with pytest.raises(InvalidArgument):
            Cursor.decode(mangled, REQUEST)


def test_the_other_alphabet_is_refused():
    mangled = Cursor(EntryId(1, 19), 2067).encode(REQUEST).replace("-", "+").replace("_", "/")
    assert "+" in mangled or "/" in mangled
    with pytest.raises(InvalidArgument):
        Cursor.decode(mangled, REQUEST)


@given(st.text(min_size=1))
def test_no_other_text_is_a_cursor(text):
    with pytest.raises(InvalidArgument) as caught:
        Cursor.decode(text, REQUEST)
    assert caught.value.fields[0].field == "cursor"


@given(cursors)
def test_another_requests_cursor_is_refused(cursor):
    for other in (RequestKeys("default", "r2"), RequestKeys("tenant", "r1")):
        with pytest.raises(InvalidArgument):
            Cursor.decode(cursor.encode(other), REQUEST)
