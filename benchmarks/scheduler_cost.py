"""What do the scheduler, the block manager and the step's Python cost, with a model that costs nothing?

Milliseconds a decode step at 32 to 256 sequences: without sampling (schedule, and what follows a step), and
the whole step with greedy sampling over the packaged model's 49,152 tokens. Blocks are filled and handed out
as in a real run; prefix caching is on. Where growth is said to be linear, a tenth is left to the readings.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

from harness.engine import engine_environment
from harness.places import BENCHMARKS
from harness.rows import against, alone
from harness.script import Record, run

SIZES = (32, 64, 128, 256)
STEPS, QUICK_STEPS = 400, 64
VOCABULARY = 49_152


def measure(record: Record) -> None:
    """The sizes take turns, like contenders."""
    options = record.options
    steps = QUICK_STEPS if options.quick else STEPS
    bare: dict[int, list[float]] = {size: [] for size in SIZES}
    whole: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(options.runs):
        for size in SIZES:
            bare[size].append(_step_ms(size, steps))
            whole[size].append(_step_ms(size, steps, "--vocabulary", str(VOCABULARY)))
    record.runs |= {"without_sampling_ms": bare, "whole_ms": whole}
    scheduling = {size: statistics.median(times) for size, times in bare.items()}
    for size in SIZES:
        record.note(
            f"{size} sequences: {scheduling[size]:.3f} ms without sampling, "
            f"{statistics.median(whole[size]):.3f} ms the whole step"
        )
    few, many = SIZES[0], SIZES[-1]
    record.add(
        alone(f"scheduling at {many} sequences, a step", scheduling[many], "<= 1.0 ms"),
        against(
            f"scheduling, ms a sequence at {many} over {few} (1: linear)",
            scheduling[many] / many,
            scheduling[few] / few,
            "<= 1.1",
        ),
        alone(f"whole mock step at {few} sequences", statistics.median(whole[few]), "<= 1.5 ms"),
    )


def _step_ms(num_seqs: int, steps: int, *further: str) -> float:
    """The median step, in a process with the variables that the worker gives to its engine."""
    command = [
        sys.executable,
        "-m",
        "engines.treadle_mock",
        "--num-seqs",
        str(num_seqs),
        "--steps",
        str(steps),
    ]
    environment = os.environ | engine_environment("treadle")
    answer = subprocess.run(
        [*command, *further], stdout=subprocess.PIPE, env=environment, cwd=BENCHMARKS, check=True
    )
    times: list[float] = json.loads(answer.stdout)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    raise SystemExit(run("scheduler_cost", __doc__, measure))
