"""How fast does one answer come, token by token, against llama.cpp with the packaged Q4_1 weights?

A prompt of 32 tokens and 128 new ones; the pace is that of the tokens after the first.
"""

from __future__ import annotations

import argparse

from harness.engine import EngineProcess, Name
from harness.prompts import cut
from harness.rows import against
from harness.script import Record, run
from harness.turns import median, paces

PROMPT, NEW, QUICK_NEW = 32, 128, 24
TARGETS = {"int4": ">= 1.3"}


def measure(record: Record) -> None:
    """The engines take turns with one prompt each."""
    options = record.options
    new = QUICK_NEW if options.quick else NEW
    wanted: list[tuple[Name, str]] = [*(("treadle", dtype) for dtype in options.dtypes), ("llamacpp", "q4_1")]
    with record.engines(wanted, ("--max-num-seqs", "1")) as engines:

        def once(engine: EngineProcess, turn: int | str) -> float:
            return engine.generate(cut(turn, 1, PROMPT), new).decode_per_s

        for engine in engines:
            once(engine, "warm-up")
        readings = paces(engines, once, options.runs)
    record.runs["decode_per_s"] = readings
    peer = median(readings, "llamacpp q4_1", "tok/s")
    for dtype in options.dtypes:
        ours = median(readings, f"treadle {dtype}", "tok/s")
        if dtype in TARGETS:
            record.add(against(f"one stream tok/s, {dtype} vs llama.cpp Q4_1", ours, peer, TARGETS[dtype]))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which forms of the weights Treadle runs."""
    parser.add_argument(
        "--dtypes", nargs="+", default=["bf16", "int4"], help="Treadle's (default: %(default)s)"
    )


if __name__ == "__main__":
    raise SystemExit(run("single_stream", __doc__, measure, add_options, runs=5))
