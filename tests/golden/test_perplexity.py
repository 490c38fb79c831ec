"""SmolLM2 in bfloat16 on a real text, against transformers on the same ids.

The reference computes in float32: what bfloat16 costs counts as a difference, too, and a CPU without
bfloat16 instructions would take minutes for it.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from profiles import BFLOAT16
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from treadle_worker.batch import ScheduledChunk
from treadle_worker.model_runner import ModelRunner

WINDOW = 4096
CHUNK = 256
TEXT = Path(__file__).parents[1] / "data" / "shakespeare.txt"


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum over the rows, in float64."""
    return -logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item()


@pytest.mark.timeout(900)
def test_perplexity_of_a_window_equals_transformers(smollm2_folder: Path):
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids[:WINDOW]
    assert len(ids) == WINDOW
    targets = torch.tensor(ids[1:])

    model = BFLOAT16.load(smollm2_folder)
    runner = ModelRunner(model, BFLOAT16.cache(model.config, WINDOW // 32, 32))
    ours, table = 0.0, list(range(WINDOW // 32))
    for start in range(0, WINDOW, CHUNK):
        logits = runner.prompt_logits([ScheduledChunk(ids[start : start + CHUNK], start, table, 0)])
        expected = targets[start : start + CHUNK]
        ours += negative_log_likelihood(logits[: len(expected)], expected)

    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    theirs = 0.0
    with torch.inference_mode():
        hidden = reference.model(torch.tensor([ids])).last_hidden_state[0]
        for start in range(0, WINDOW, CHUNK):
            expected = targets[start : start + CHUNK]
            logits = reference.lm_head(hidden[start : start + len(expected)])
            theirs += negative_log_likelihood(logits, expected)

    perplexity, other = math.exp(ours / (WINDOW - 1)), math.exp(theirs / (WINDOW - 1))
    print(f"perplexity {perplexity:.4f}, transformers {other:.4f}, ratio {perplexity / other:.5f}")
    assert 5 < other < 60
    assert abs(perplexity / other - 1) < 0.005
