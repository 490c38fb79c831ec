"""What does a running suite hold in memory?

The cache is small and every block of it has been written, so that all of it counts: what the engine holds
beyond the weights and the cache, and what every other service holds, is 300 MB at most. Proportional set
sizes, which share out the pages that processes have in common.
"""

from __future__ import annotations

import argparse
import asyncio

from harness import models
from harness.prompts import cut
from harness.rows import alone
from harness.script import Record, run
from harness.suite import Suite, suite

from treadle.client import AsyncClient, GenerationRequest

CACHE = 128 << 20
MOST = "<= 300 MB"
REQUESTS, PROMPT, NEW = 16, 1000, 16
"""Together three times as many tokens as the cache holds."""
TIMEOUT_S = 300.0
_WEIGHT_BITS = {"bf16": 16, "int8": 8, "int4": 4}


def measure(record: Record) -> None:
    """One suite, one load, one reading."""
    options = record.options
    prompts = cut("memory", REQUESTS, PROMPT)
    with suite(options.dtype, kv_cache_bytes=CACHE) as running:
        asyncio.run(_fill(running, prompts))
        held = {name: process.memory_full_info().pss for name, process in running.processes().items()}
    weights = sum(path.stat().st_size for path in models.folder().glob("*.safetensors"))
    weights = weights * _WEIGHT_BITS[options.dtype] // 16
    record.runs |= {"pss": held, "weights": weights, "cache": CACHE}
    for name, size in held.items():
        record.note(f"{name}: {size / 1e6:.0f} MB")
    others = {name: size for name, size in held.items() if name != "engine"}
    largest = max(others, key=others.__getitem__)
    record.note(f"{largest} is the largest beside the engine; weights {weights / 1e6:.0f} MB")
    record.add(
        alone(
            f"engine beyond weights and cache, {options.dtype}",
            (held["engine"] - weights - CACHE) / 1e6,
            MOST,
        ),
        alone("the largest other service", others[largest] / 1e6, MOST),
    )


async def _fill(running: Suite, prompts: list[list[int]]) -> None:
    requests = [
        GenerationRequest(token_ids=prompt, max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        for prompt in prompts
    ]
    async with AsyncClient(running.address, model=models.ALIAS, timeout_s=TIMEOUT_S) as client:
        async for item in client.batch(requests):
            assert item.error is None, item.error


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which form of the weights."""
    parser.add_argument("--dtype", default="bf16", help="of the weights (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(run("memory", __doc__, measure, add_options, runs=1))
