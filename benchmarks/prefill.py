"""How fast is a prompt of 256 tokens read, against transformers in bf16?

One prompt and one new token: the pace is the prompt's tokens over the time to the first token.
"""

from __future__ import annotations

import argparse

from harness.engine import EngineProcess, Name
from harness.prompts import cut
from harness.rows import against
from harness.script import Record, run
from harness.turns import median, paces

PROMPT = 256
TARGETS = {"bf16": ">= 1.4", "int8": ">= 2.0"}


def measure(record: Record) -> None:
    """The engines take turns with some prompts each, one after another."""
    options = record.options
    each = 2 if options.quick else 5
    wanted: list[tuple[Name, str]] = [
        *(("treadle", dtype) for dtype in options.dtypes),
        ("transformers", "bf16"),
    ]
    with record.engines(wanted) as engines:

        def once(engine: EngineProcess, turn: int | str) -> float:
            return each * PROMPT / engine.generate(cut(turn, each, PROMPT), 1, "one").wall_s

        for engine in engines:
            once(engine, "warm-up")
        readings = paces(engines, once, options.runs)
    record.runs["prefill_per_s"] = readings
    peer = median(readings, "transformers bf16", "tok/s")
    for dtype in options.dtypes:
        ours = median(readings, f"treadle {dtype}", "tok/s")
        if dtype in TARGETS:
            name = f"prefill of {PROMPT} tok/s, {dtype} vs transformers bf16"
            record.add(against(name, ours, peer, TARGETS[dtype]))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which forms of the weights Treadle runs."""
    parser.add_argument("--dtypes", nargs="+", default=list(TARGETS), help="Treadle's (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(run("prefill", __doc__, measure, add_options, runs=5))
