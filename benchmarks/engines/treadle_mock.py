"""Treadle's engine around a model that costs nothing: what is left is the scheduler and the step's Python.

python -m engines.treadle_mock --num-seqs 32 --steps 400 [--vocabulary 49152]    # prints seconds a step
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence as ListOf

import torch

from treadle_worker.batch import ScheduledChunk
from treadle_worker.block_manager import BlockManager
from treadle_worker.engine import Engine
from treadle_worker.engine_protocol import AddRequest, SamplingParams
from treadle_worker.sampler import Sample, Sampler, SampleRow
from treadle_worker.scheduler import Scheduler

BLOCK_SIZE = 32
_PROMPT = 100
_LENGTH = 2048


class _MockRunner:
    """Gives logits that were made before: [rows, vocabulary]."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._logits = torch.zeros((rows, vocab_size))
        self._logits[:, 7] = 1.0

    def run(self, chunks: ListOf[ScheduledChunk]) -> torch.Tensor:
        return self._logits[: sum(chunk.num_logits for chunk in chunks)]


class _MockSampler(Sampler):
    """The same token for every row, and none of a sampler's work."""

    def sample(self, logits_RV: torch.Tensor, rows: ListOf[SampleRow]) -> list[Sample | None]:
        return [Sample(7, None) for _ in rows]


def step_times(num_seqs: int, num_steps: int, *, vocab_size: int | None = None) -> list[float]:
    """Seconds of each step that decodes one token for each of so many sequences.

    `vocab_size`: sample greedily, by the real sampler, from logits of so many tokens; None: no sampling.
    """
    blocks = BlockManager(num_seqs * _LENGTH // BLOCK_SIZE, BLOCK_SIZE, enable_prefix_caching=True)
    engine = Engine(
        _MockRunner(num_seqs, vocab_size or 16),
        Scheduler(blocks, max_num_seqs=num_seqs, max_num_batched_tokens=max(256, num_seqs)),
        _MockSampler() if vocab_size is None else Sampler(),
        vocab_size=vocab_size or 16,
        max_model_len=_LENGTH,
    )
    sampling = SamplingParams(temperature=0.0, max_new_tokens=_LENGTH)
    for number in range(num_seqs):
        # A beginning of its own: prompts that share blocks would be cheaper.
        prompt = [number >> 4, number & 15, *([3] * _PROMPT)]
        engine.add_request(AddRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    while engine.scheduler.num_waiting or len(engine.step().outputs) < num_seqs:
        if engine.scheduler.num_waiting:
            engine.step()
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        outputs = engine.step().outputs
        times.append(time.perf_counter() - started)
        assert len(outputs) == num_seqs, "a step decodes every sequence"
    return times


def main() -> None:
    """Prints the times as a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-seqs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, help="sample from so many tokens; left out: no sampling")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    print(json.dumps(step_times(options.num_seqs, options.steps, vocab_size=options.vocabulary)))


if __name__ == "__main__":
    main()
