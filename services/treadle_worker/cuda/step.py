"""Where the tokens of a step stand, worked out on the host and copied to the device at once.

T: tokens of the step; R: rows of a graph; n: blocks of a row's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.kv_cache import CudaKVCache

Integers = npt.NDArray[np.int64]


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy there. To CUDA it goes from pinned memory, so that nobody waits for it; torch keeps that
    memory until the copy is made."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Staging:
    """Integers of one step for the device, gathered so that one copy brings them all."""

    def __init__(self) -> None:
        self._parts: list[Integers] = []
        self._length = 0

    def add(self, values: Integers) -> slice:
        """Where they will stand in what `send` gives."""
        self._parts.append(values)
        self._length += len(values)
        return slice(self._length - len(values), self._length)

    def send(self, device: torch.device) -> Tensor:
        """Everything that was added, int64."""
        return to_device(np.concatenate(self._parts), device)


class Places(NamedTuple):
    """Of each token of a step: its position in its sequence, and its slot in the cache."""

    positions_T: Integers
    slots_T: Integers

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk], block_size: int) -> Places:
        """In the chunks' order."""
        lengths = [len(chunk.token_ids) for chunk in chunks]
        tables = [chunk.block_table for chunk in chunks]
        first_rows = np.array(list(accumulate(lengths, initial=0))[:-1], np.int64)
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        firsts = list(accumulate(map(len, tables), initial=0))
        blocks = np.fromiter(chain.from_iterable(tables), np.int64, firsts[-1])
        positions = np.arange(sum(lengths)) + np.repeat(starts - first_rows, lengths)
        block_T = blocks[np.repeat(np.array(firsts[:-1], np.int64), lengths) + positions // block_size]
        return cls(positions, block_T * block_size + positions % block_size)


class HostRows:
    """Rows of a graph on the host: one token each. Rows that are not set are padding: token 0 at position 0,
    which reads the zero block and writes the scratch block."""

    def __init__(self, num_rows: int, width: int, cache: CudaKVCache) -> None:
        self.block_size = cache.block_size
        self.flat = np.zeros(num_rows * (3 + width), np.int64)
        fields = self.flat[: 3 * num_rows].reshape(3, num_rows)
        self.token_ids, self.positions, self.slots = fields[0], fields[1], fields[2]
        self.tables = self.flat[3 * num_rows :].reshape(num_rows, width)
        self.slots[:] = cache.scratch_block * cache.block_size
        self.tables[:] = cache.zero_block

    def set(self, chunks: Sequence[ScheduledChunk]) -> None:
        """A row for each token: those of one chunk stand side by side and share its table."""
        places = Places.of(chunks, self.block_size)
        count = len(places.positions_T)
        self.token_ids[:count] = [token for chunk in chunks for token in chunk.token_ids]
        self.positions[:count], self.slots[:count] = places
        row = 0
        for chunk in chunks:
            end = row + len(chunk.token_ids)
            held = num_blocks(chunk, self.block_size)
            self.tables[row:end, :held] = chunk.block_table[:held]
            row = end


class RowBuffers:
    """The rows on the device, always in the same place: what a graph reads."""

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.flat = torch.zeros(num_rows * (3 + width), dtype=torch.int64, device=device)
        self.token_ids_R, self.positions_R, self.slots_R = self.flat[: 3 * num_rows].view(3, num_rows)
        self.tables_Rn = self.flat[3 * num_rows :].view(num_rows, width)

    def fill(self, host: HostRows) -> None:
        """Takes the rows over."""
        self.flat.copy_(to_device(host.flat, self.flat.device))


def num_blocks(chunk: ScheduledChunk, block_size: int) -> int:
    """Blocks that hold the chunk and what is before it."""
    return (chunk.start + len(chunk.token_ids) - 1) // block_size + 1
