"""The list of what is served, and its pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import DataLoss, InvalidArgument, Unavailable
from treadle_gateway.listing import Aliases, Listed, list_served, page
from treadle_gateway.models import Loaded


def loaded(digest: str, profile: str, *, length: int = 50, ready: bool = True) -> Loaded:
    return Loaded(profile, digest, "c", "t", "name-at-worker", length, 100, ready)


def test_each_name_and_profile_is_a_line():
    lines = list_served(
        [
            loaded("a", "p1"),
            loaded("a", "p1", length=40),
            loaded("a", "p2"),
            loaded("b", "p3"),
            loaded("c", "p4", ready=False),
        ],
        [("x", "a"), ("y", "a"), ("gone", "z")],
    )
    assert [(one.model, one.profile, one.ready_workers, one.max_model_len) for one in lines] == [
        ("b", "p3", 1, 50),
        ("x", "p1", 2, 40),
        ("x", "p2", 1, 50),
        ("y", "p1", 2, 40),
        ("y", "p2", 1, 50),
    ]


def test_what_could_not_be_loaded_stands_with_its_reason_until_somebody_has_it():
    failed = replace(loaded("a", "p1", ready=False), error=DataLoss("damaged"))
    (line,) = list_served([failed, loaded("b", "p1", ready=False)], [("x", "a")])
    assert (line.model, line.ready_workers, line.max_model_len) == ("x", 0, 0)
    assert line.error is failed.error
    (line,) = list_served([failed, loaded("a", "p1")], [("x", "a")])
    assert (line.ready_workers, line.max_model_len, line.error) == (1, 50, None)


@given(
    st.sets(st.tuples(st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=5)), max_size=30),
    st.integers(0, 12),
)
def test_pages_are_the_whole_list(keys, size):
    lines = [Listed(model, "d", profile, 1, 1, 1) for model, profile in sorted(keys)]
    found, token, pages = [], "", 0
    while True:
        shown, token = page(lines, size, token)
        found += shown
        pages += 1
        if not token:
            break
    assert found == lines
    assert size == 0 or pages == max(1, -(-len(lines) // size))


@given(st.text(min_size=1, max_size=40))
def test_no_other_text_is_a_token(token):
    with pytest.raises(InvalidArgument):
        page([], 0, token)


class StubRegistry:
    def __init__(self) -> None:
        self.away = False

    async def aliases(self, *, timeout_s: float):
        if self.away:
            raise Unavailable("away")
        yield "x", "a"


async def test_aliases_outlive_the_registry(monkeypatch):
    monkeypatch.setattr("treadle_gateway.listing.ARTIFACT_FRESH_S", 0.0)
    registry = StubRegistry()
    aliases = Aliases(registry, timeout_s=1)
    registry.away = True
    assert await aliases.read([loaded("a", "p")]) == [("name-at-worker", "a")]
    registry.away = False
    assert await aliases.read([]) == [("x", "a")]
    registry.away = True
    assert await aliases.read([]) == [("x", "a")]
