"""Generation and embedding on one worker: does each keep its configured share of the device?

One worker serves both models. Each load first has the machine alone, then both run at once. What a load keeps
is its pace beside the other over its pace alone; over its share that is 1 where sharing costs nothing. The
time between two chunks of an answer is told beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from harness import models
from harness.prompts import cut, default_text
from harness.rows import against
from harness.script import Record, run
from harness.sentences import sentences
from harness.suite import suite

from treadle.client import AsyncClient

SHARES, QUICK_SHARES = (0.25, 0.5, 0.75), (0.5,)
"""Of the device's time, for embedding."""
WINDOW_S, QUICK_WINDOW_S = 20.0, 5.0
STREAMS, PROMPT, NEW = 16, 64, 256
EMBEDDERS, BATCH = 4, 32
_TIMEOUT_S = 300.0


def measure(record: Record) -> None:
    """A suite for each share."""
    options = record.options
    window_s = QUICK_WINDOW_S if options.quick else WINDOW_S
    for share in QUICK_SHARES if options.quick else SHARES:
        served = (models.ALIAS, models.EMBEDDER)
        environment = {"TREADLE_WORKER_TASK_SHARE": str(share)}
        with suite("auto", served=served, environment=environment) as running:
            readings = asyncio.run(_windows(running.address, window_s, options.text))
        record.runs[f"share {share}"] = readings
        (tokens, rows), (tokens_beside, rows_beside), gaps = readings
        record.note(
            f"share {share}: {tokens:.0f} tok/s alone, {tokens_beside:.0f} beside; "
            f"{rows:.0f} sentences/s alone, {rows_beside:.0f} beside; "
            f"99 of 100 chunks come within {gaps[0]:.0f} ms alone, {gaps[1]:.0f} beside"
        )
        record.add(
            against(f"embedding at a share of {share}", rows_beside, rows * share, ">= 0.85"),
            against(f"generation at a share of {1 - share}", tokens_beside, tokens * (1 - share), ">= 0.85"),
        )


async def _windows(address: str, window_s: float, text: Path) -> list[tuple[float, float]]:
    """(tokens/s, sentences/s) of each load alone and of both at once; then the 99th percentile of the time
    between chunks, in ms, of both."""
    async with AsyncClient(address, timeout_s=_TIMEOUT_S) as client:
        lines = sentences(text, 50 * BATCH)
        gaps: list[float] = []

        async def generate(count: Callable[[int], None]) -> None:
            for turn in itertools.count():
                (prompt,) = cut(f"{turn}/{id(count)}", 1, PROMPT)
                stream = client.stream(
                    token_ids=prompt, model=models.ALIAS, max_new_tokens=NEW, temperature=0.0, ignore_eos=True
                )
                heard = 0.0
                async with stream:
                    async for chunk in stream:
                        now = time.monotonic()
                        if heard:
                            gaps.append(1e3 * (now - heard))
                        heard = now
                        count(len(chunk.token_ids))

        async def embed(count: Callable[[int], None]) -> None:
            for start in itertools.cycle(range(0, len(lines), BATCH)):
                await client.embed(lines[start : start + BATCH], model=models.EMBEDDER)
                count(BATCH)

        loads = {generate: STREAMS, embed: EMBEDDERS}
        (tokens,) = await _pace({generate: STREAMS}, window_s)
        gap = statistics.quantiles(gaps, n=100)[-1]
        (rows,) = await _pace({embed: EMBEDDERS}, window_s)
        gaps.clear()
        tokens_beside, rows_beside = await _pace(loads, window_s)
        gap_beside = statistics.quantiles(gaps, n=100)[-1]
        return [(tokens, rows), (tokens_beside, rows_beside), (gap, gap_beside)]


Load = Callable[[Callable[[int], None]], Awaitable[None]]


async def _pace(loads: dict[Load, int], window_s: float) -> list[float]:
    """Each load's count a second in the window's last three quarters, so many of each at once."""
    counts = [0] * len(loads)
    open_from = time.monotonic() + window_s / 4

    def counter(place: int) -> Callable[[int], None]:
        def count(number: int) -> None:
            if time.monotonic() >= open_from:
                counts[place] += number

        return count

    tasks = [
        asyncio.ensure_future(load(counter(place)))
        for place, (load, number) in enumerate(loads.items())
        for _ in range(number)
    ]
    await asyncio.sleep(window_s)
    for task in tasks:
        task.cancel()
    ended: Sequence[object] = await asyncio.gather(*tasks, return_exceptions=True)
    with contextlib.suppress(asyncio.CancelledError):
        for one in ended:
            if isinstance(one, BaseException):
                raise one
    return [count / (0.75 * window_s) for count in counts]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The text."""
    parser.add_argument("--text", type=Path, default=default_text(), help="default: %(default)s")


if __name__ == "__main__":
    raise SystemExit(run("device_share", __doc__, measure, add_options, runs=1))
