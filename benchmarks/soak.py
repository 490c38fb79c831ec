"""Does the suite leak? Ten thousand short requests, a third of them cancelled, and what every process holds.

    python benchmarks/soak.py [--requests 10000] [--concurrency 48]

Starts a suite of its own (one worker, the packaged SmolLM2, Valkey) in a temporary folder. Readings are taken
every minute and, at rest, after each tenth of the requests: load is held back until nothing runs any more.
They are written to benchmarks/results/soak-<requests>.csv. The exit code is 1 where, between the first tenth
and the end, the resident memory of the suite's processes has grown by more than 2% together, or by more than
2% and 5 MiB in any one (a Python process of 75 MiB moves by some of them as its allocator settles),
open files (but for two) or threads have become more, or a request that nobody cancelled failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table
from soak_load import Job, Load, jobs
from soak_readings import TOTAL, VALKEY, Growth, Reading, growths, read, suite_processes, write_csv

from treadle.api.worker.v1 import worker_pb2, worker_pb2_grpc
from treadle.cli.report import Report
from treadle.local import Home, LocalStack, StackOptions
from treadle.local.config import inherited_environment
from treadle.rpc import open_channel

RESULTS = Path(__file__).parent / "results"
ALLOWED = 0.02
"""Growth of resident memory since the first tenth."""
NOISE = 5 << 20
"""Bytes by which one process may have grown all the same."""
MORE = {"open_files": 2, "threads": 0}
"""A pool may have opened one more connection, or two, below its bound."""
MIN_CANCELLED = 0.3
_TENTHS = 10
_REST_S = 10.0
"""What was cancelled must be gone by then; it would run for minutes."""
_SETTLE_S = 2.0
_EVERY_S = 60.0
_BAR_S = 5.0


class Soak:
    """A running suite under load, and the readings of it."""

    def __init__(self, stack: LocalStack, load: Load, total: int, console: Console) -> None:
        self.readings: list[Reading] = []
        self.at_rest: list[list[Reading]] = []
        """After each tenth of the load."""
        self._stack = stack
        self._load = load
        self._total = total
        self._console = console
        self._started = time.monotonic()
        self._parent = psutil.Process()
        self._redis = Redis(port=_port(suite_processes(self._parent)[VALKEY]))

    async def run(self, todo: Sequence[Job]) -> None:
        """The whole load, with a reading a minute and one at rest after each tenth of it."""
        watching = [asyncio.create_task(self._every_minute()), asyncio.create_task(self._progress())]
        try:
            for tenth in _tenths(todo, self._total):
                await self._load.run(iter(tenth))
                await self._rest()
                self.at_rest.append(self._read(at_rest=True))
                self._say(self.at_rest[-1])
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await self._redis.aclose()

    def _read(self, *, at_rest: bool) -> list[Reading]:
        readings = read(
            self._parent,
            elapsed_s=time.monotonic() - self._started,
            requests=self._load.tally.done,
            at_rest=at_rest,
        )
        self.readings += readings
        return readings

    async def _every_minute(self) -> None:
        while True:
            self._read(at_rest=False)
            await asyncio.sleep(_EVERY_S)

    async def _progress(self) -> None:
        """A line that is written over and over, in a terminal only."""
        while self._console.is_terminal:
            done, took = self._load.tally.done, time.monotonic() - self._started
            bar = "█" * (40 * done // self._total)
            print(f"\r{bar:<40} {done}/{self._total}  {took:.0f} s ", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(_BAR_S)

    def _say(self, readings: Sequence[Reading]) -> None:
        tally, total = self._load.tally, readings[-1]
        self._console.print(
            f"\r{tally.done:>6} requests in {total.elapsed_s:.0f} s: {tally.cancelled.total()} cancelled, "
            f"{len(tally.failures)} failed, {tally.tokens} tokens; resident {total.rss / 2**20:.1f} MiB, "
            f"{total.open_files} open files, {total.threads} threads",
            highlight=False,
        )

    async def _rest(self) -> None:
        """Waits until no request is left in the engine or a lane; raises TimeoutError where one stays."""
        async with asyncio.timeout(_REST_S), open_channel(self._stack.addresses["worker"]) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            while True:
                status = await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=_REST_S)
                engine = status.profiles[0].engine
                lanes = [await self._redis.xlen(key) for key in await self._redis.keys("treadle:lane:*")]
                if not (engine.num_requests_running or engine.num_requests_waiting or sum(lanes)):
                    break
                await asyncio.sleep(0.1)
        # This process's own channels hold their connections to the gateway until they are collected.
        gc.collect()
        await asyncio.sleep(_SETTLE_S)


def _tenths(todo: Sequence[Job], total: int) -> list[list[Job]]:
    """The jobs in ten stretches of about as many requests each."""
    stretches: list[list[Job]] = [[] for _ in range(_TENTHS)]
    before = 0
    for job in todo:
        stretches[min(_TENTHS - 1, before * _TENTHS // total)].append(job)
        before += job.size
    return stretches


def _port(valkey: psutil.Process) -> int:
    """Where it listens."""
    (port,) = {end.laddr.port for end in valkey.net_connections("tcp") if end.status == psutil.CONN_LISTEN}
    return int(port)


def verdict(found: Sequence[Growth], load: Load) -> list[str]:
    """What was promised and does not hold."""
    wrong = []
    for one in found:
        # Valkey keeps the answers of the last minute: it holds as much as the load was quick.
        noise = 0 if one.process == TOTAL else NOISE
        if one.process != VALKEY and one.share > ALLOWED and one.after.rss - one.before.rss > noise:
            wrong.append(f"{one.process}: resident memory has grown by {one.share:.1%}")
        for column, more in MORE.items():
            before, after = getattr(one.before, column), getattr(one.after, column)
            if after > before + more:
                wrong.append(f"{one.process}: {column} went from {before} to {after}")
    tally = load.tally
    if tally.failures:
        wrong.append(f"{len(tally.failures)} requests failed, the first: {tally.failures[0]}")
    if tally.cancelled.total() < MIN_CANCELLED * tally.done:
        wrong.append(f"only {tally.cancelled.total()} of {tally.done} requests were cancelled")
    return wrong


def table(found: Sequence[Growth]) -> Table:
    """A line a process."""
    columns = ("process", "resident MiB", "growth", "", "unshared MiB", "growth", "open files", "threads")
    shown = Table(*columns, title=f"from {found[0].before.requests} to {found[0].after.requests} requests")
    for one in found:
        before, after = one.before, one.after
        shown.add_row(
            one.process,
            f"{after.rss / 2**20:.1f}",
            f"{(after.rss - before.rss) / 2**20:+.2f}",
            f"{one.share:+.2%}",
            f"{after.uss / 2**20:.1f}",
            f"{(after.uss - before.uss) / 2**20:+.2f}",
            f"{after.open_files} ({after.open_files - before.open_files:+})",
            f"{after.threads} ({after.threads - before.threads:+})",
            end_section=one.process == found[-2].process,
            style="bold" if one.process == TOTAL else "",
        )
    return shown


@contextlib.asynccontextmanager
async def running_stack(console: Console) -> AsyncIterator[LocalStack]:
    """A suite as `treadle up` starts it, in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="treadle-soak-") as folder:
        options = StackOptions(port=0, inherited=inherited_environment())
        async with LocalStack(Home(Path(folder)), options, Report(console)) as stack:
            yield stack


async def soak(total: int, concurrency: int, seed: int, out: Path) -> int:
    """Runs it all; the exit code."""
    console = Console(stderr=True, soft_wrap=True)
    async with running_stack(console) as stack:
        load = Load(stack.addresses["gateway"], concurrency=concurrency)
        run = Soak(stack, load, total, console)
        try:
            await run.run(list(jobs(total, seed)))
        finally:
            write_csv(out, run.readings)
    found = growths(run.at_rest[0], run.at_rest[-1])
    wrong = verdict(found, load)
    results = Console(width=None if sys.stdout.isatty() else 120)
    results.print(table(found))
    tally = load.tally
    for name, counted in (("ended", tally.ended), ("cancelled", tally.cancelled)):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))
        results.print(f"{counted.total()} {name}: {kinds}", highlight=False)
    results.print(f"readings: {out}", highlight=False)
    for failure in itertools.islice(tally.failures, 10):
        results.print(f"failed: {failure}", style="red", highlight=False)
    for complaint in wrong:
        results.print(complaint, style="bold red", highlight=False)
    return 1 if wrong else 0


def main() -> int:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=48, help="calls at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the readings' file (default: results/soak-<requests>.csv)")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / f"soak-{arguments.requests}.csv"
    return asyncio.run(soak(arguments.requests, arguments.concurrency, arguments.seed, out))


if __name__ == "__main__":
    sys.exit(main())
