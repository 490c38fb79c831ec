"""What a step computes for one sequence: the contract between the scheduler's side and the model runner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence.

    `token_ids` stand at positions `start`, `start + 1`, …; the keys and values of every position before
    `start` are already in the cache. `block_table[i]` is the block that holds positions
    `i * block_size` to `(i + 1) * block_size - 1`, and covers the chunk's last position.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    num_logits: int
    """How many of the chunk's last tokens need their logits: 0 in the middle of a prompt, else 1, or more to
    check a draft."""


def opened_blocks(chunks: Sequence[ScheduledChunk], block_size: int) -> list[int]:
    """Blocks that get their first token in this step and are not filled by it."""
    opened = []
    for chunk in chunks:
        end = chunk.start + len(chunk.token_ids)
        if end % block_size and chunk.start <= end - end % block_size:
            opened.append(chunk.block_table[end // block_size])
    return opened
