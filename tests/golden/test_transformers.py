"""Every architecture against transformers, float32, past the window and the first rope length."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from paged_run import Driver
from profiles import FLOAT32, TORCH_FLOAT32, Profile
from tiny_models import KINDS, VOCABULARY, make

NEW_TOKENS = 64


def is_greedy(model, tokens: list[int], prompt_length: int) -> bool | None:
    """Whether transformers, given each prefix, takes the same next token; None: a near tie on the way.

    By induction over the prefixes that is the same as generating them.
    """
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, prompt_length - 1 : -1]
    best = logits.topk(2)
    if (best.values[:, 0] - best.values[:, 1]).min() < 1e-3:
        return None
    return best.indices[:, 0].tolist() == tokens[prompt_length:]


@pytest.mark.parametrize("profile", [FLOAT32, TORCH_FLOAT32], ids=lambda one: one.name)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_transformers(kind: str, profile: Profile, tmp_path: Path):
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"{kind}: seed {seed}")
    rng = random.Random(seed)
    model = make(kind, tmp_path, seed, max_shard_size="60KB" if kind == "qwen3" else "5GB")
    if kind == "qwen3":
        assert (tmp_path / "model.safetensors.index.json").exists(), "the shards were not made"
    lengths = [150, 200, *(rng.randint(1, 140) for _ in range(14))]
    prompts = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    driver = Driver(tmp_path, profile, seed=seed)

    whole = driver.row(prompts[1], 200)
    with torch.no_grad():
        expected = model(torch.tensor([prompts[1]])).logits[0]
    difference = (driver.runner.prompt_logits([whole.chunk(200)]) - expected).abs().max().item()
    print(f"{kind}: prompt logits differ by at most {difference:.2e}, of {expected.abs().max():.1f}")
    assert expected.std() > 0.3
    assert difference < 1e-4
    driver.release(whole)

    alone = driver.row(prompts[0], lengths[0] + NEW_TOKENS)
    driver.greedy([alone], NEW_TOKENS)
    driver.release(alone)
    batch = [driver.row(prompt, len(prompt) + NEW_TOKENS) for prompt in prompts]
    driver.greedy(batch, NEW_TOKENS)
    assert all(len(row.tokens) == length + NEW_TOKENS for row, length in zip(batch, lengths, strict=True))
    assert alone.tokens == batch[0].tokens
    verdicts = [is_greedy(model, row.tokens, length) for row, length in zip(batch, lengths, strict=True)]
    compared = sum(verdict is not None for verdict in verdicts)
    print(f"{kind}: {compared} of 16 runs of {NEW_TOKENS} greedy tokens compared")
    assert compared >= 6
    assert False not in verdicts
