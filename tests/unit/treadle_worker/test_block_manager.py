"""Prefix reuse: what is found, by whom, for how long."""

from __future__ import annotations

import pytest

from treadle_worker.block_manager import BlockManager
from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.sequence import Sequence

SIZE = 4


def sequence_of(tokens: list[int], salt: str = "") -> Sequence:
    return Sequence(
        request_id="r",
        token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(max_new_tokens=1),
        arrival=0,
        cache_salt=salt,
    )


def run(blocks: BlockManager, sequence: Sequence) -> list[int]:
    """Computes the sequence and frees it; returns its block table."""
    blocks.allocate(sequence, blocks.find_prefix(sequence))
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)
    table = list(sequence.block_table)
    blocks.free(sequence)
    return table


@pytest.mark.parametrize(("length", "found"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (30, 3)])
def test_the_last_token_is_always_computed(length, found):
    blocks = BlockManager(16, SIZE)
    run(blocks, sequence_of([7] * 12))
    assert len(blocks.find_prefix(sequence_of([7] * length))) == found


def test_a_prefix_is_shared_while_it_is_in_use():
    blocks = BlockManager(16, SIZE)
    first, second = sequence_of(list(range(10))), sequence_of([*range(8), 99, 98])
    blocks.allocate(first, [])
    assert blocks.find_prefix(second) == [], "what is not computed is not shared"
    first.num_computed_tokens = 10
    blocks.commit(first)
    prefix = blocks.find_prefix(second)
    assert prefix == first.block_table[:2]
    blocks.allocate(second, prefix)
    assert second.num_computed_tokens == 8
    assert blocks.num_free_blocks == 16 - 3 - 1
    blocks.free(first)
    assert blocks.num_free_blocks == 16 - 3
    blocks.free(second)
    assert blocks.num_free_blocks == 16


def test_nothing_is_shared_between_salts():
    blocks = BlockManager(16, SIZE)
    run(blocks, sequence_of([7] * 12, salt="a"))
    assert len(blocks.find_prefix(sequence_of([7] * 12, salt="a"))) == 2
    assert blocks.find_prefix(sequence_of([7] * 12, salt="b")) == []
    assert blocks.find_prefix(sequence_of([7] * 12)) == []


def test_a_block_is_named_by_all_before_it():
    blocks = BlockManager(16, SIZE)
    run(blocks, sequence_of([1] * 4 + [2] * 4 + [3]))
    assert blocks.find_prefix(sequence_of([2] * 4 + [3])) == []
    assert len(blocks.find_prefix(sequence_of([1] * 4 + [9] * 5))) == 1


def test_what_was_freed_longest_ago_is_reused_first_and_ends_before_beginnings():
    blocks = BlockManager(5, SIZE)
    old = run(blocks, sequence_of([1] * 9))
    new = run(blocks, sequence_of([2] * 9))
    taken = sequence_of([3] * 8)
    blocks.allocate(taken, [])
    assert taken.block_table == [new[2], old[1]], "first the block without a name"
    assert blocks.find_prefix(sequence_of([1] * 9)) == old[:1]
    assert blocks.find_prefix(sequence_of([2] * 9)) == new[:2]


def test_a_prefix_that_nobody_uses_counts_as_needed():
    blocks = BlockManager(4, SIZE)
    run(blocks, sequence_of([1] * 9))
    sequence = sequence_of([1] * 17)
    prefix = blocks.find_prefix(sequence)
    assert len(prefix) == 2
    assert not blocks.can_allocate(sequence, prefix)
    sequence = sequence_of([1] * 16)
    assert blocks.can_allocate(sequence, prefix)
    assert not blocks.can_allocate(sequence, prefix, reserve=1)


def test_two_that_computed_the_same_keep_one_findable():
    blocks = BlockManager(8, SIZE)
    twins = [sequence_of([5] * 5) for _ in range(2)]
    for twin in twins:
        blocks.allocate(twin, [])
        twin.num_computed_tokens = 5
    for twin in twins:
        blocks.commit(twin)
    assert blocks.find_prefix(sequence_of([5] * 5)) == twins[0].block_table[:1]
    blocks.free(twins[0])
    blocks.free(twins[1])
    assert blocks.num_free_blocks == 8


def test_without_caching_nothing_is_found():
    blocks = BlockManager(8, SIZE, enable_prefix_caching=False)
    run(blocks, sequence_of([5] * 9))
    assert blocks.find_prefix(sequence_of([5] * 9)) == []
