"""How soon does a second request answer that begins with the same 1,024 tokens?

The first of each pair computes the prefix, the second finds it in the cache; both end with 16 tokens of their
own. The ratio is the second's time to first token over the first's.
"""

from __future__ import annotations

import argparse
import statistics

from harness.engine import EngineProcess
from harness.prompts import cut
from harness.rows import against
from harness.script import Record, run

PREFIX, QUICK_PREFIX, OWN = 1024, 256, 16
TARGET = "<= 0.10"


def measure(record: Record) -> None:
    """Pairs with a prefix of their own each, at an engine that has nothing else to do."""
    options = record.options
    prefix = QUICK_PREFIX if options.quick else PREFIX
    first: list[float] = []
    second: list[float] = []
    with record.engine("treadle", options.dtype, ("--prefix-caching",)) as engine:
        if engine is not None:
            _first_token_s(engine, cut("warm-up", 1, prefix)[0])
            for turn in range(options.runs):
                (shared,), owns = cut(turn, 1, prefix), cut(turn, 2, OWN)
                first.append(_first_token_s(engine, shared + owns[0]))
                second.append(_first_token_s(engine, shared + owns[1]))
    record.runs |= {"first_s": first, "second_s": second}
    cold, hit = (1e3 * statistics.median(times) if times else None for times in (first, second))
    name = f"shared prefix of {prefix}: second's ms to first token over the first's, {options.dtype}"
    record.add(against(name, hit, cold, TARGET))


def _first_token_s(engine: EngineProcess, prompt: list[int]) -> float:
    (taken,) = engine.generate([prompt], 1).first_token_s
    assert taken is not None
    return taken


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which form of the weights."""
    parser.add_argument("--dtype", default="bf16", help="of the weights (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(run("prefix_hits", __doc__, measure, add_options, runs=5))
