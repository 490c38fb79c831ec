"""What do int8 and int4 weights cost in quality? Perplexity on a held text, against bf16.

Fails where int8 is worse than bf16 by more than 1%, or int4 by more than 5%. The packaged model was published
in Q4_1: its bf16 is dequantised from that, and what that cost before is not measured here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from harness import models
from harness.places import BENCHMARKS
from harness.prompts import default_text
from harness.rows import against
from harness.script import Record, run

TARGETS = {"int8": "<= 1.01", "int4": "<= 1.05"}
QUICK_TOKENS = 2048


def measure(record: Record) -> None:
    """Each form in a process of its own."""
    options = record.options
    tokens = QUICK_TOKENS if options.quick else options.tokens
    found = {dtype: _perplexity(record, dtype, tokens) for dtype in ("bf16", *TARGETS)}
    record.runs["perplexity"] = found
    for dtype, target in TARGETS.items():
        name = f"perplexity of {options.text.stem}, {dtype} vs bf16"
        record.add(against(name, found[dtype], found["bf16"], target))


def _perplexity(record: Record, dtype: str, tokens: int) -> float | None:
    options = record.options
    answer = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "perplexity.py"), "--dtype", dtype, "--tokens", str(tokens)),
            *("--model", options.model, "--text", str(options.text)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        record.note(f"{dtype}: {(answer.stderr.strip() or 'no output').splitlines()[-1]}")
        return None
    value = float(json.loads(answer.stdout)["perplexity"])
    record.note(f"{dtype}: perplexity {value:.4f}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """The text and the model."""
    parser.add_argument("--text", type=Path, default=default_text(), help="default: %(default)s")
    parser.add_argument("--model", default=models.ALIAS, help="a folder, or a model of the local store")
    parser.add_argument("--tokens", type=int, default=32_768, help="of the text (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(run("quality", __doc__, measure, add_options, runs=1))
