"""The same bits however a step is put together: every profile, tiny models and the real one."""

from __future__ import annotations

import pytest
import torch
from paged_run import Driver, Row
from profiles import BFLOAT16, FLOAT32, INT4, INT8, PROFILES, Profile
from tiny_models import VOCABULARY, make

KINDS = ["smollm2", "llama3", "mistral", "qwen2_window", "qwen3"]


def same(one: Row, other: Row) -> int:
    """Asserts equal tokens and bitwise equal logits; gives the number of rows compared."""
    assert one.tokens == other.tokens
    assert len(one.logits) == len(other.logits) > 0
    for left, right in zip(one.logits, other.logits, strict=True):
        assert torch.isfinite(left).all()
        assert torch.equal(left, right)
    return len(one.logits)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda one: one.name)
@pytest.mark.parametrize("kind", KINDS)
def test_layout_batch_and_chunks_change_no_bit(kind, profile: Profile, tmp_path, rng):
    make(kind, tmp_path, rng.randrange(1 << 31))
    driver = Driver(tmp_path, profile, seed=rng.randrange(1 << 31))
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 120))] for _ in range(12)]
    check_invariance(driver, prompts, rng, new_tokens=10, largest_chunk=50)


@pytest.mark.parametrize("profile", [FLOAT32, BFLOAT16, INT8, INT4], ids=lambda one: one.name)
def test_the_real_model_changes_no_bit(smollm2_folder, profile: Profile, rng):
    driver = Driver(smollm2_folder, profile, num_blocks=120, block_size=32, seed=rng.randrange(1 << 31))
    prompts = [[rng.randrange(49152) for _ in range(rng.randint(1, 150))] for _ in range(6)]
    check_invariance(driver, prompts, rng, new_tokens=5, largest_chunk=70)


def check_invariance(driver: Driver, prompts, rng, *, new_tokens: int, largest_chunk: int) -> None:
    """Alone and contiguous against: batched, shuffled blocks, random chunks, recomputed after preemption."""
    alone = []
    for prompt in prompts:
        row = driver.row(prompt, len(prompt) + new_tokens, identity=True)
        driver.greedy([row], new_tokens)
        driver.release(row)
        alone.append(row)

    rng.shuffle(driver.free)
    batched = [driver.row(prompt, len(prompt) + new_tokens) for prompt in prompts]
    assert any(row.table != sorted(row.table) for row in batched)
    driver.greedy(batched, new_tokens)
    compared = sum(same(one, other) for one, other in zip(alone, batched, strict=True))
    driver.release(*batched)

    chunked = [driver.row(prompt, len(prompt) + new_tokens) for prompt in prompts]
    chunks = 0
    while any(len(row.logits) < new_tokens for row in chunked):
        live = [row for row in chunked if len(row.logits) < new_tokens and rng.random() < 0.7]
        if not live:
            continue
        before = [len(row.logits) for row in live]
        driver.step(live, [rng.randint(1, largest_chunk) for _ in live])
        for row, number in zip(live, before, strict=True):
            if len(row.logits) > number:
                row.tokens.append(int(row.logits[-1].argmax()))
            else:
                chunks += 1
    assert chunks > 0
    compared += sum(same(one, other) for one, other in zip(alone, chunked, strict=True))
    driver.release(*chunked)

    recomputed = 0
    for row, prompt in zip(alone, prompts, strict=True):
        kept = rng.randint(1, new_tokens - 1)
        again = driver.row(row.tokens[: len(prompt) + kept], len(row.tokens))
        driver.greedy([again], new_tokens - kept, chunk=largest_chunk)
        again.logits = row.logits[:kept] + again.logits
        compared += same(row, again)
        driver.release(again)
        recomputed += kept
    assert recomputed > 0
    print(f"{compared} rows of logits equal bitwise; {chunks} chunks, {recomputed} decoded tokens recomputed")
