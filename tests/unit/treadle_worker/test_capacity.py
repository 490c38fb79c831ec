"""How many more requests are claimed, by what is held."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from treadle_worker.engine_protocol import Ready
from treadle_worker.intake import MAX_TASKS, Capacity


def held(*num_tokens: int) -> list[SimpleNamespace]:
    """Stands in for a table: what is asked of it is its length, and its requests' tokens."""
    return [SimpleNamespace(num_tokens=each) for each in num_tokens]


def capacity(table: list[SimpleNamespace], *, generates: bool = True, num_blocks: int = 100) -> Capacity:
    ready = Ready(
        max_model_len=512,
        vocab_size=10,
        num_blocks=num_blocks if generates else 0,
        block_size=16 if generates else 0,
        max_num_seqs=8,
        process_id=1,
        tasks=["score"] if generates else ["embed"],
        generates=generates,
    )
    return Capacity(table, ready, max_claimed=32, max_claimed_tokens=1000)


@pytest.mark.parametrize(
    ("tokens", "free"),
    [((), 8), ((15,), 7), ((160,), 7), ((160,) * 6, 2), ((1599,), 2), ((4000,) * 3, 0), ((15,) * 8, 0)],
)
def test_a_decoder_has_room_by_seats_and_blocks(tokens, free):
    assert capacity(held(*tokens)).free() == free


@pytest.mark.parametrize(
    ("tokens", "free"),
    [
        ((), MAX_TASKS),
        ((1,), MAX_TASKS - 1),
        ((0, 0), MAX_TASKS - 2),
        ((100,), 9),
        ((100,) * 9, 1),
        ((100,) * 10, 0),
        ((4000,), 7),
        ((4000,) * 8, 0),
        ((1,) * MAX_TASKS, 0),
    ],
)
def test_an_encoder_has_room_by_tokens(tokens, free):
    assert capacity(held(*tokens), generates=False).free() == free
