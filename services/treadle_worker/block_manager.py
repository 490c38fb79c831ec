"""Which block of the KV cache belongs to whom: reference counts, and prefixes that are shared.

A block holds the keys and values of `block_size` consecutive tokens. They depend on every token before
them, so a full block is named by a hash chained over all of its prefix; the chain starts at the salt, and
nothing is ever shared between salts. Blocks that nobody uses stay findable until they are needed again:
the one that was freed longest ago goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from treadle_worker.sequence import Sequence


class BlockManager:
    """Hands out the blocks 0 to num_blocks - 1. Every operation is O(1) a block it touches."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody uses, those with a findable prefix included."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence's tokens start with.

        Tokens that must be computed to have logits are never among them: the last one, or those scored.
        """
        if not self.enable_prefix_caching:
            return []
        found: list[int] = []
        for index in range(sequence.max_cached_tokens // self.block_size):
            block = self._block_of.get(self._block_hash(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, sequence: Sequence, prefix: list[int], *, reserve: int = 0) -> bool:
        """Whether there are blocks for all of the sequence's tokens, given the prefix that was found.

        `reserve` blocks must be left over.
        """
        idle_prefix = sum(1 for block in prefix if self._ref_counts[block] == 0)
        fresh = self.num_blocks_for(sequence.num_tokens) - len(prefix)
        return fresh + idle_prefix + reserve <= len(self._free)

    def allocate(self, sequence: Sequence, prefix: list[int]) -> None:
        """Gives the sequence the prefix and fresh blocks for the rest; its prefix counts as computed."""
        assert not sequence.block_table, "a sequence is allocated once"
        for block in prefix:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        sequence.block_table = list(prefix)
        sequence.num_computed_tokens = len(prefix) * self.block_size
        sequence.num_committed_blocks = len(prefix)
        self._grow(sequence)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether the sequence's blocks hold all of its tokens."""
        return len(sequence.token_ids) <= len(sequence.block_table) * self.block_size

    def can_append(self, sequence: Sequence, num_more: int = 0) -> bool:
        """Whether there are blocks for the tokens that the sequence got since it was allocated.

        And for `num_more` behind them, which it may get.
        """
        return self._num_missing(sequence, num_more) <= len(self._free)

    def append(self, sequence: Sequence, num_more: int = 0) -> None:
        """Gives the sequence the blocks that `can_append` asks for."""
        self._grow(sequence, num_more)

    def trim(self, sequence: Sequence) -> None:
        """Takes back the blocks behind the sequence's last token: those of a draft that was rejected."""
        for _ in range(-self._num_missing(sequence)):
            block = sequence.block_table.pop()
            assert self._hash_of[block] is None, "only computed tokens make a block findable"
            self._ref_counts[block] = 0
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def commit(self, sequence: Sequence) -> None:
        """Makes the sequence's full, computed blocks findable.

        Call it once the step that computed them is known to be sound. Where another block already holds
        the same prefix, that one stays the findable one.
        """
        first, end = sequence.num_committed_blocks, sequence.num_computed_tokens // self.block_size
        if first >= end or not self.enable_prefix_caching:
            return
        for index in range(first, end):
            block, name = sequence.block_table[index], self._block_hash(sequence, index)
            if name not in self._block_of:
                self._block_of[name] = block
                self._hash_of[block] = name
            sequence.num_committed_blocks = index + 1

    def free(self, sequence: Sequence) -> None:
        """Takes the sequence's blocks back; those that are findable stay so until they are reused.

        The end of a prefix is reused before its beginning, which more requests share.
        """
        for block in reversed(sequence.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_committed_blocks = 0

    def _num_missing(self, sequence: Sequence, num_more: int = 0) -> int:
        return -(-(len(sequence.token_ids) + num_more) // self.block_size) - len(sequence.block_table)

    def _grow(self, sequence: Sequence, num_more: int = 0) -> None:
        for _ in range(self._num_missing(sequence, num_more)):
            block, _ = self._free.popitem(last=False)
            if (name := self._hash_of[block]) is not None:
                del self._block_of[name]
                self._hash_of[block] = None
            self._ref_counts[block] = 1
            sequence.block_table.append(block)

    def _block_hash(self, sequence: Sequence, index: int) -> bytes:
        """256 bits of BLAKE2b: no two prefixes, and no two salts, share a name by accident or design."""
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else _digest(sequence.cache_salt.encode(), person=b"salt")
            tokens = array("Q", sequence.token_ids[start : start + size])
            hashes.append(_digest(parent + tokens.tobytes(), person=b"block"))
        return hashes[index]


def _digest(data: bytes, *, person: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32, person=person).digest()
