"""How many tokens a second does the bare engine make of many prompts at once, against vLLM in bf16?

32 prompts of 128 tokens with 64 new ones each, and 16 of 64 with 48. The targets are about the first load;
both are in the raw file, with each form's share of the roofline.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from harness import models, roofline
from harness.engine import EngineProcess, Name
from harness.prompts import cut
from harness.rows import against
from harness.script import Record, run
from harness.turns import median, paces


class Load(NamedTuple):
    """So many prompts of so many tokens, and so many new ones each."""

    requests: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.requests} x ({self.prompt}+{self.new})"


LOADS = (Load(32, 128, 64), Load(16, 64, 48))
QUICK = (Load(8, 32, 16),)
TARGETS = {"bf16": ">= 1.1", "int8": ">= 2.0"}


def measure(record: Record) -> None:
    """All engines are loaded, then take turns."""
    options = record.options
    loads = QUICK if options.quick else LOADS
    wanted: list[tuple[Name, str]] = [*(("treadle", dtype) for dtype in options.dtypes), ("vllm", "bf16")]
    with record.engines(wanted) as engines:
        for load in loads:
            for engine in engines:
                engine.generate(cut("warm-up", load.requests, load.prompt), load.new)
        limit = roofline.measure()
        record.note(f"products: {limit.bf16_gflops:.0f} GFLOP/s in bf16, {limit.int8_gops:.0f} Gop/s in int8")
        record.runs["roofline"] = vars(limit)
        for load in loads:
            _compare(record, engines, load, limit)


def _compare(record: Record, engines: list[EngineProcess], load: Load, limit: roofline.Roofline) -> None:
    record.note(f"{load}:")

    def once(engine: EngineProcess, turn: int) -> float:
        return engine.generate(cut(turn, load.requests, load.prompt), load.new).output_per_s

    readings = paces(engines, once, record.options.runs)
    record.runs[str(load)] = readings
    peer = median(readings, "vllm bf16", "tok/s")
    tokens = load.requests * (load.prompt + load.new - 1)
    work = roofline.operations(models.folder(), tokens=tokens, outputs=load.requests * load.new)
    for dtype in record.options.dtypes:
        ours = median(readings, f"treadle {dtype}", "tok/s")
        if ours is not None:
            share = limit.share(dtype, work, load.requests * load.new / ours)
            record.note(f"treadle {dtype}: {share:.0%} of the roofline")
        if dtype in TARGETS and load == (QUICK if record.options.quick else LOADS)[0]:
            record.add(against(f"offline {load} tok/s, {dtype} vs vLLM bf16", ours, peer, TARGETS[dtype]))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which forms of the weights Treadle runs."""
    parser.add_argument("--dtypes", nargs="+", default=list(TARGETS), help="Treadle's (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(run("offline_throughput", __doc__, measure, add_options))
