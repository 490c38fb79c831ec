"""What an engine's largest steps take of a CUDA device beside weights and cache, found by running them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from treadle_worker.batch import ScheduledChunk
from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.model_runner import ModelRunner
from treadle_worker.sampler import Sampler, SampleRow
from treadle_worker.score_tasks import logprobs

Measure = Callable[[torch.device, Callable[[], object]], int]
"""The bytes that a function takes at most."""


def extra_bytes(device: torch.device, compute: Callable[[], object]) -> int:
    """The most that it takes of a CUDA device beyond what is allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def activation_bytes(
    runner: ModelRunner,
    *,
    max_num_seqs: int,
    max_rows: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    max_score_rows: int,
    graphs: AbstractContextManager[object] | None,
    measure: Measure = extra_bytes,
) -> int:
    """Bytes, as `measure` finds them for one step. `max_rows`: single tokens of a step, drafts included;
    `max_score_rows`: rows of logits of texts that are scored, beside those that are drawn from.

    The runner's cache may be of one block: every table repeats it. `graphs` makes current the stream on which
    they are captured, if there are any: they keep what a step of single tokens takes in a pool of their own,
    and libraries what they need a stream, so both are added up.
    """
    sampler, device = Sampler(), runner.device
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, max_new_tokens=1)

    def run(chunks: list[ScheduledChunk]) -> None:
        logits_RV = runner.run(chunks)
        if len(logits_RV) > len(chunks):
            logprobs(scored_RV := logits_RV[len(chunks) :], np.zeros(len(scored_RV), np.int64))
        sampler.sample(logits_RV[: len(chunks)], [SampleRow(params, 0)] * len(chunks))

    block_size = runner.cache.block_size
    lengths = largest_step(max_num_seqs, max_num_batched_tokens, max_model_len)
    prompts = [_at_the_end(length, max_model_len, block_size) for length in lengths]
    prompts = _scored(prompts, max_score_rows)
    tokens = [_at_the_end(1, max_model_len, block_size)] * max_rows
    of_prompts = measure(device, partial(run, prompts))
    if graphs is None:
        return max(of_prompts, measure(device, partial(run, tokens)))
    with graphs:
        return of_prompts + measure(device, partial(run, tokens))


def largest_step(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> list[int]:
    """Tokens of each sequence of a step that has as many tokens, and as many sequences, as one may have."""
    count = min(max_num_seqs, max_num_batched_tokens)
    left = min(max_num_batched_tokens, count * max_model_len) - count
    lengths = []
    for _ in range(count):
        more = min(left, max_model_len - 1)
        lengths.append(1 + more)
        left -= more
    return lengths


def _scored(chunks: list[ScheduledChunk], max_score_rows: int) -> list[ScheduledChunk]:
    """So many of the chunks' rows of logits more, as far as they have tokens."""
    scored = []
    for chunk in chunks:
        more = min(max_score_rows, len(chunk.token_ids) - chunk.num_logits)
        scored.append(replace(chunk, num_logits=chunk.num_logits + more))
        max_score_rows -= more
    return scored


def _at_the_end(length: int, max_model_len: int, block_size: int) -> ScheduledChunk:
    """The last tokens of a sequence that is as long as one may be."""
    table = [0] * -(-max_model_len // block_size)
    return ScheduledChunk([0] * length, max_model_len - length, table, 1)
