"""What does the suite add to the bare engine? CPU, delay, and what it takes of the throughput.

The same prompts go to the whole suite over gRPC (its client on the same cores) and to the engine alone, in
turns. CPU is that of every process of the suite but the engine, Valkey's included, over the output tokens.
The first token's delay is the difference of medians at rest: one request at a time, each after a pause, for
the engine, too. A processor that has slept for a tenth of a second has lost its caches.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from harness import models
from harness.engine import EngineProcess
from harness.prompts import cut
from harness.rows import against, alone
from harness.script import Record, run
from harness.suite import Suite, suite

from treadle.client import AsyncClient

LOAD, QUICK_LOAD = (32, 128, 64), (8, 32, 16)
"""Prompts, tokens of each, new ones each."""
FIRSTS, QUICK_FIRSTS = 20, 4
"""Requests at rest a turn, one after another, of 32 tokens."""
_FIRST_PROMPT = 32
_PAUSE_S = 0.1
_TIMEOUT_S = 300.0


@dataclass
class Reading:
    """One turn of one contender."""

    output_per_s: float
    first_token_s: list[float]
    cpu_s: float = 0.0
    """Of the services, while the load ran."""


def measure(record: Record) -> None:
    """Suite and engine take turns; the engine is stopped while the suite works."""
    options = record.options
    count, prompt, new = QUICK_LOAD if options.quick else LOAD
    firsts = QUICK_FIRSTS if options.quick else FIRSTS
    ours: list[Reading] = []
    bare: list[Reading] = []
    cut("warm-up", 1, 1)
    with (
        suite(options.dtype) as running,
        record.engine("treadle", options.dtype, ("--max-model-len", "8192", "--prefix-caching")) as engine,
    ):
        for turn in ("warm-up", *range(options.runs)):
            load, single = cut(turn, count, prompt), cut(turn, firsts, _FIRST_PROMPT)
            reading = asyncio.run(_suite_turn(running, load, single, new))
            if engine is not None:
                bare.append(_engine_turn(engine, load, single, new))
            ours.append(reading)
    del ours[0], bare[:1]
    record.runs |= {"suite": [vars(one) for one in ours], "engine": [vars(one) for one in bare]}
    cpu_ms = statistics.median(1e3 * one.cpu_s / (count * new) for one in ours)
    record.add(alone("CPU outside the engine, an output token", cpu_ms, "<= 0.1 ms"))
    first, bare_first = _median_first_ms(ours), _median_first_ms(bare)
    record.note(f"first token at rest: suite {first:.1f} ms, engine {bare_first or 0:.1f} ms")
    delay = None if first is None or bare_first is None else first - bare_first
    record.add(alone("first token later than the bare engine's, p50 at rest", delay, "<= 15 ms"))
    pace = statistics.median(one.output_per_s for one in ours)
    bare_pace = statistics.median(one.output_per_s for one in bare) if bare else None
    record.add(against("suite's tok/s over the bare engine's", pace, bare_pace, ">= 0.9"))


def _median_first_ms(readings: Sequence[Reading]) -> float | None:
    times = [seconds for one in readings for seconds in one.first_token_s]
    return 1e3 * statistics.median(times) if times else None


def _engine_turn(engine: EngineProcess, load: list[list[int]], single: list[list[int]], new: int) -> Reading:
    singles = engine.generate(single, 1, "one", pause_s=_PAUSE_S)
    firsts = [one for one in singles.first_token_s if one is not None]
    return Reading(engine.generate(load, new).output_per_s, firsts)


async def _suite_turn(running: Suite, load: list[list[int]], single: list[list[int]], new: int) -> Reading:
    async with AsyncClient(running.address, model=models.ALIAS, timeout_s=_TIMEOUT_S) as client:
        firsts = []
        for prompt in single:
            await asyncio.sleep(_PAUSE_S)
            firsts.append(await _stream(client, prompt, 1))
        services = [process for name, process in running.processes().items() if name != "engine"]
        before, begun = _cpu_s(services), time.monotonic()
        await asyncio.gather(*(_stream(client, prompt, new) for prompt in load))
        took = time.monotonic() - begun
        return Reading(len(load) * new / took, firsts, _cpu_s(services) - before)


async def _stream(client: AsyncClient, prompt: list[int], new: int) -> float:
    """Reads an answer to its end; seconds to its first token."""
    begun, first, count = time.monotonic(), 0.0, 0
    chunks = client.stream(token_ids=prompt, max_new_tokens=new, temperature=0.0, ignore_eos=True)
    async for chunk in chunks:
        first = first or time.monotonic() - begun
        count += len(chunk.token_ids)
    assert count == new, f"{count} tokens where {new} were asked for"
    return first


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which form of the weights."""
    parser.add_argument("--dtype", default="bf16", help="of the weights (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(run("service_overhead", __doc__, measure, add_options))
