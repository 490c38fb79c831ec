"""When artifacts were used last: in order whatever the clock does, and none is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_parts import digest_of

from treadle_registry.catalog.catalog import Catalog
from treadle_registry.uses import Uses

A, B, C, D = map(digest_of, range(4))
FILES = {A: {"a", "shared"}, B: {"b", "shared"}, C: {"c"}, D: set[str]()}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    made = Catalog(tmp_path)
    made.artifacts.index(dict.fromkeys((A, B, C, D), 1.0))
    yield made
    made.close()


def uses_of(catalog: Catalog, clock: Clock) -> Uses:
    return Uses(catalog.artifacts, lambda digest: frozenset(FILES[digest]), clock)


def order(uses: Uses) -> list[str]:
    last = uses.last()
    return sorted(last, key=lambda digest: (last[digest], digest))


def test_a_clock_that_is_set_back_or_far_ahead_changes_no_order(catalog: Catalog, clock: Clock):
    uses = uses_of(catalog, clock)
    uses.touch(A)
    clock.now = 10.0
    uses.touch(B)
    uses.keep()
    clock.now = 1e12
    uses.touch(C)
    clock.now = 2000.0
    # After a restart, too.
    uses.keep()
    uses = uses_of(catalog, clock)
    uses.touch(D)
    uses.touch(A)
    assert order(uses) == [B, C, D, A]
    uses.keep()
    assert list(catalog.artifacts.last_uses()) == [B, C, D, A]


def test_a_file_that_is_sent_is_a_use_of_all_that_have_it(catalog: Catalog, clock: Clock):
    uses = uses_of(catalog, clock)
    uses.touch(C)
    uses.touch_file("shared")
    uses.touch(D)
    assert order(uses) == [C, A, B, D]
    uses.touch_file("a")
    uses.touch_file("of nobody")
    assert order(uses) == [C, B, D, A]
    uses.keep()
    assert list(catalog.artifacts.last_uses()) == [C, B, D, A]
    # What was written is not written over by what is older.
    uses.touch(B)
    uses.keep()
    assert order(uses_of(catalog, clock)) == [C, D, A, B]


def test_no_use_is_lost_however_it_is_written(catalog: Catalog, clock: Clock, rng: random.Random):
    uses, expected = uses_of(catalog, clock), [A, B, C, D]
    written = 0
    for _ in range(500):
        digest = rng.choice(expected)
        clock.now += rng.uniform(-5.0, 5.0)
        uses.touch(digest)
        expected.remove(digest)
        expected.append(digest)
        if rng.random() < 0.3:
            uses.keep()
            written += 1
            if rng.random() < 0.3:
                uses = uses_of(catalog, clock)
        assert order(uses) == expected
    print(f"500 uses in their order, written {written} times")
    assert written > 50


def test_what_is_used_while_it_is_written_is_written_the_next_time(
    catalog: Catalog, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    uses, used, busy = uses_of(catalog, clock), catalog.artifacts.used, 0

    def slow(times: dict[str, float]) -> None:
        nonlocal busy
        # Nobody who looks meanwhile misses what is about to be written.
        assert order(uses)[-1] == A
        uses.touch(B)
        busy += 1
        used(times)

    uses.touch(A)
    with monkeypatch.context() as patched:
        patched.setattr(catalog.artifacts, "used", slow)
        uses.keep()
    assert busy == 1
    assert order(uses) == [C, D, A, B]
    uses.keep()
    assert list(catalog.artifacts.last_uses()) == [C, D, A, B]
    monkeypatch.setattr(catalog.artifacts, "used", lambda times: pytest.fail("written again"))
    uses.keep()
