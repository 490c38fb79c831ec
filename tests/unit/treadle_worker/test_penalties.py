"""Penalties, bias and suppression against a slow float64 reference over random parameters."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.penalties import (
    TokenHistory,
    add_logit_bias,
    apply_penalties,
    has_penalties,
    suppress_tokens,
)

VOCAB = 97


def reference(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    """The definitions, a token at a time."""
    counts, result = Counter(output), []
    for token, logit in enumerate(logits):
        if token in set(prompt) | set(output):
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * counts[token]
        logit -= params.presence_penalty if counts[token] > 0 else 0.0
        result.append(logit)
    return result


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=1,
        repetition_penalty=rng.choice([1.0, rng.uniform(0.5, 2)]),
        presence_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
        frequency_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_against_the_definitions(seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, VOCAB, generator=generator) * 4
    before, penalties, expected = logits.clone(), [], logits.tolist()
    for row in rng.sample(range(9), 6):
        prompt = rng.choices(range(VOCAB), k=rng.randint(1, 150))
        output = rng.choices(range(VOCAB), k=rng.randint(0, 150))
        params, history = random_params(rng), TokenHistory(prompt, output[: len(output) // 2])
        for token in output[len(output) // 2 :]:
            history.append(token)
        penalties.append((row, params, history))
        expected[row] = reference(before[row].tolist(), params, prompt, output)
    apply_penalties(logits, penalties)
    assert torch.allclose(logits.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-4, rtol=1e-6)
    changed = sum(not torch.equal(logits[row], before[row]) for row in range(9))
    assert changed == sum(has_penalties(params) for _, params, _ in penalties)
    print(f"{changed} rows changed")


def test_repetition_counts_the_prompt_and_the_others_only_the_output():
    history = TokenHistory([3, 3, 3], [5, 5])
    logits = torch.ones(1, 8)
    params = SamplingParams(
        max_new_tokens=1, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125
    )
    apply_penalties(logits, [(0, params, history)])
    assert logits[0].tolist() == [1, 1, 1, 0.5, 1, 0.5 - 0.25 - 0.25, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_counts_after_a_draft_are_those_of_a_history_that_has_it(seed):
    rng = random.Random(seed)
    prompt, output, draft = (rng.choices(range(40), k=k) for k in (15, 10, 6))
    history, kept = TokenHistory(prompt, output), TokenHistory(prompt, output)
    for end in range(len(draft) + 1):
        seen, grown = history.counts_after(draft[:end]), TokenHistory(prompt, output + draft[:end])
        assert seen.token_ids.tolist() == grown.token_ids.tolist()
        assert seen.output_counts.tolist() == grown.output_counts.tolist()
    assert history.token_ids.tolist() == kept.token_ids.tolist()
    assert history.output_counts.tolist() == kept.output_counts.tolist()
    print(f"{len(seen.token_ids) - len(history.token_ids)} of {len(draft)} tokens are new")


def test_bias_and_suppression_touch_only_their_rows():
    logits = torch.zeros(3, 5)
    add_logit_bias(logits, [(0, {1: 2.5}), (2, {0: -100.0, 4: 1.0})])
    suppress_tokens(logits, [(1, (2, 3))])
    assert logits.tolist() == [
        [0, 2.5, 0, 0, 0],
        [0, 0, -torch.inf, -torch.inf, 0],
        [-100, 0, 0, 0, 1],
    ]
