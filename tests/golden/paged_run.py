"""Drives a model runner by hand: block tables, chunks, greedy steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from profiles import Profile

from treadle_worker.batch import ScheduledChunk
from treadle_worker.model_runner import ModelRunner


@dataclass
class Row:
    """One sequence."""

    tokens: list[int]
    table: list[int]
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def chunk(self, length: int) -> ScheduledChunk:
        """Its next tokens, at most `length`; counts them as computed."""
        start, self.done = self.done, min(self.done + length, len(self.tokens))
        return ScheduledChunk(
            self.tokens[start : self.done], start, self.table, self.done == len(self.tokens)
        )


class Driver:
    """A runner with a pool of blocks that are dealt out in a random order."""

    def __init__(
        self, folder: Path, profile: Profile, *, num_blocks: int = 400, block_size: int = 16, seed: int = 0
    ):
        model = profile.load(folder)
        self.runner = ModelRunner(model, profile.cache(model.config, num_blocks, block_size))
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)

    def row(self, tokens: list[int], length: int, *, identity: bool = False) -> Row:
        """A sequence with room for `length` tokens; `identity`: blocks in a row."""
        count = -(-length // self.runner.cache.block_size)
        if identity:
            self.free.sort()
        table, self.free = self.free[:count], self.free[count:]
        return Row(list(tokens), table)

    def release(self, *rows: Row) -> None:
        """Gives the blocks back."""
        for row in rows:
            self.free += row.table

    def step(self, rows: list[Row], lengths: list[int]) -> None:
        """One step: the next chunk of each row; logits are kept where a row's end was reached."""
        chunks = [row.chunk(length) for row, length in zip(rows, lengths, strict=True)]
        logits = iter(self.runner.run(chunks))
        for row, chunk in zip(rows, chunks, strict=True):
            if chunk.num_logits:
                row.logits.append(next(logits).clone())

    def greedy(self, rows: list[Row], count: int, *, chunk: int = 10**9) -> None:
        """`count` greedy tokens for each row, prompts in chunks."""
        while any(len(row.logits) < count for row in rows):
            live = [row for row in rows if len(row.logits) < count]
            before = [len(row.logits) for row in live]
            self.step(live, [chunk] * len(live))
            for row, number in zip(live, before, strict=True):
                if len(row.logits) > number:
                    row.tokens.append(int(row.logits[-1].argmax()))
