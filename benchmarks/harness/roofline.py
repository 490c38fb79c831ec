"""How fast the machine multiplies, and how many multiplications an answer takes.

    python benchmarks/harness/roofline.py      # measures; prints JSON

The share of the roofline is the time that a load's products would take at the machine's measured pace, over
the time that it took. Attention over the cache is left out: it is small for the lengths asked here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SIZE = 1536
_TRIES = 12


@dataclass(frozen=True)
class Roofline:
    """Operations a second in products of matrices, with all cores."""

    bf16_gflops: float
    int8_gops: float

    def share(self, dtype: str, operations: float, seconds: float) -> float:
        """Of the pace that the form of the weights allows; 1 is all of it."""
        peak = self.bf16_gflops if dtype == "bf16" else self.int8_gops
        return operations / (peak * 1e9 * seconds)


def measure() -> Roofline:
    """The best of some tries in a process of its own, whose threads end with it."""
    answer = subprocess.run([sys.executable, __file__], stdout=subprocess.PIPE, check=True)
    return Roofline(**json.loads(answer.stdout))


def operations(model: Path, *, tokens: int, outputs: int) -> float:
    """Of the products for so many computed tokens, and so many rows of logits.

    Two a weight: the layers' weights for every token, the vocabulary's for every output.
    """
    config: dict[str, int] = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"]
    body, vocabulary = config["num_hidden_layers"] * layer, hidden * config["vocab_size"]
    return 2.0 * (tokens * body + outputs * vocabulary)


def _main() -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    a_bf16, b_bf16 = a.bfloat16(), b.bfloat16()
    a_int8, b_int8 = (16 * a).to(torch.int8), (16 * b).to(torch.int8)

    def pace(multiply: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(_TRIES):
            started = time.perf_counter()
            multiply()
            best = min(best, time.perf_counter() - started)
        return 2e-9 * _SIZE**3 / best

    with torch.inference_mode():
        bf16 = pace(lambda: torch.nn.functional.linear(a_bf16, b_bf16))
        int8 = pace(lambda: torch._int_mm(a_int8, b_int8))
    print(json.dumps({"bf16_gflops": bf16, "int8_gops": int8}))


if __name__ == "__main__":
    _main()
