"""How many requests a second end well when real traffic arrives, against vLLM's and llama.cpp's servers?

Arrivals and lengths come from a trace (Azure's LLM inference traces and CSVs like them), lengths clipped to
2,048 tokens together, arrivals stretched to 0.5, 0.8 and 1.0 of what the better peer can do when 64 requests
wait at once. A request ends well where the p99 of the gaps between its tokens is 250 ms at most. The loop is
open, and the client runs on the same cores. Treadle is the whole suite over gRPC; it is started anew for
every rate, and the peers stand still (SIGSTOP) while they are not asked.

With --minutes and --memory-csv, Treadle alone is asked at --rate for so long, and every process's memory is
written once a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import models, servers
from harness.places import DATA, MissingPeer
from harness.prompts import default_text
from harness.replay import DRAIN_S, Outcome, Target, replay, summary
from harness.rows import above
from harness.script import Record, run
from harness.suite import Suite, suite
from harness.trace import Arrival, at_rate, read
from soak_readings import Reading, write_csv
from soak_readings import read as read_memory

from treadle.client import AsyncClient

SHARES = (0.5, 0.8, 1.0)
SATURATING, QUICK_SATURATING = 64, 6
"""Requests that wait at once when a peer's saturation is measured: every fourth, for the trace's first ones
are shorter than those that a replay comes to."""
_SATURATED_S = 900.0
_TIMEOUT_S = 3600.0
_MINUTE_S = 60.0


class TreadleTarget:
    """The suite's gateway."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        """See `replay.Target`."""
        chunks = self._client.stream(
            token_ids=prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True
        )
        async for chunk in chunks:
            if chunk.token_ids:
                yield len(chunk.token_ids)


def measure(record: Record) -> None:
    """Saturation of the peers, then each rate for each server; or one long replay of Treadle's."""
    options = record.options
    if not options.trace.exists():
        record.note(f"there is no trace at {options.trace}: name one with --trace")
        record.add(*(above(_row_name(share), None, None) for share in SHARES))
        return
    trace = read(options.trace, servers.MAX_MODEL_LEN)
    if options.quick:
        trace = [replace(one, prompt_tokens=min(one.prompt_tokens, 64), new_tokens=8) for one in trace]
    if options.minutes:
        _long(record, trace)
        return
    with contextlib.ExitStack() as stack:
        peers = list(_started(record, stack))
        saturations = {one.name: _saturation(record, one, peers, trace) for one in peers}
        record.runs["saturation_per_s"] = saturations
        best = max(saturations.values(), default=options.rate)
        if not best:
            record.note("no peer, and so no saturation: give a --rate")
            record.add(*(above(_row_name(share), None, None) for share in SHARES))
            return
        for share in (1.0,) if options.rate else SHARES:
            rate = options.rate or share * best
            arrivals = at_rate(trace, rate, 20.0 if options.quick else options.duration_s)
            name = f"replay at {rate:.3g} req/s, goodput req/s" if options.rate else _row_name(share)
            ours = _treadle(record, arrivals, peers, f"{name}: treadle")
            theirs = [_peer(record, one, peers, arrivals, f"{name}: {one.name}") for one in peers]
            record.add(above(name, ours, max(theirs) if len(theirs) == len(servers.PEERS) else None))


def _row_name(share: float) -> str:
    return f"replay at {share:g} of saturation, goodput req/s"


def _started(record: Record, stack: contextlib.ExitStack) -> Iterator[servers.PeerServer]:
    """The peers that there are, standing still."""
    for name in servers.PEERS:
        try:
            yield stack.enter_context(servers.peer(name))
        except (MissingPeer, RuntimeError) as error:
            record.note(f"{name}: {error}")


@contextlib.contextmanager
def _alone(peers: Sequence[servers.PeerServer], asked: servers.PeerServer | None = None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for one in peers:
            if one is not asked:
                stack.enter_context(one.resting())
        yield


def _saturation(
    record: Record, server: servers.PeerServer, peers: Sequence[servers.PeerServer], trace: Sequence[Arrival]
) -> float:
    """Requests a second when all wait at once."""
    count = QUICK_SATURATING if record.options.quick else SATURATING
    at_once = [replace(one, at_s=0.0) for one in trace[: 4 * count : 4]]
    with _alone(peers, server):
        server.first_token([1, 2, 3])
        found = summary(_replay(server, at_once, record.options.text, drain_s=_SATURATED_S))
    rate = float(str(found["ended_per_s"]))
    record.note(f"{server.name}: {rate:.3g} requests/s when {count} wait at once")
    return rate


def _peer(
    record: Record,
    server: servers.PeerServer,
    peers: Sequence[servers.PeerServer],
    arrivals: Sequence[Arrival],
    label: str,
) -> float:
    with _alone(peers, server):
        return _told(record, label, _replay(server, arrivals, record.options.text))


def _treadle(
    record: Record, arrivals: Sequence[Arrival], peers: Sequence[servers.PeerServer], label: str
) -> float:
    options = record.options
    with _alone(peers), suite(options.dtype) as running:
        return _told(record, label, asyncio.run(_ask_suite(running, arrivals, options.text)))


def _replay(
    target: Target, arrivals: Sequence[Arrival], text: Path, drain_s: float = DRAIN_S
) -> list[Outcome]:
    return asyncio.run(replay(target, arrivals, text, drain_s=drain_s))


async def _ask_suite(running: Suite, arrivals: Sequence[Arrival], text: Path) -> list[Outcome]:
    async with AsyncClient(running.address, model=models.ALIAS, timeout_s=_TIMEOUT_S) as client:
        target = TreadleTarget(client)
        async for _ in target.stream([1, 2, 3], 1):
            pass
        return await replay(target, arrivals, text)


def _told(record: Record, label: str, outcomes: list[Outcome]) -> float:
    """Notes what a replay came to; gives its goodput."""
    found: dict[str, Any] = summary(outcomes)
    record.runs[label] = found | {"outcomes": [_compact(one) for one in outcomes]}
    first, gap = found["first_token_s"], found["gap_s"]
    record.note(
        f"{label}: {found['goodput_per_s']:.3g}; {found['good']} good and {found['ended']} ended of "
        f"{found['requests']}; {found['output_per_s']:.1f} tok/s; first token "
        f"{_shown(first)} s, gap {_shown(gap)} s (p50/p90/p99)"
    )
    for error in found["errors"]:
        record.note(f"  {error}")
    return float(found["goodput_per_s"])


def _shown(percentiles: dict[str, float | None]) -> str:
    return "/".join("–" if value is None else f"{value:.3f}" for value in percentiles.values())


def _compact(one: Outcome) -> list[object]:
    """Arrival, lengths, first token, end, whether it was good."""
    first = round(one.times_s[0], 3) if one.times_s else None
    end = None if one.end_s is None else round(one.end_s, 3)
    return [round(one.at_s, 3), one.prompt_tokens, one.new_tokens, first, end, one.is_good]


def _long(record: Record, trace: Sequence[Arrival]) -> None:
    options = record.options
    arrivals = at_rate(trace, options.rate or 0.5, options.minutes * 60)
    with suite(options.dtype) as running:
        outcomes, readings = asyncio.run(_watched(running, arrivals, options.text))
    _told(record, f"treadle for {options.minutes:g} minutes", outcomes)
    if options.memory_csv:
        write_csv(options.memory_csv, readings)
        record.note(f"memory of every process, minute by minute: {options.memory_csv}")


async def _watched(
    running: Suite, arrivals: Sequence[Arrival], text: Path
) -> tuple[list[Outcome], list[Reading]]:
    """A replay, and what every process of the suite holds once a minute."""
    readings: list[Reading] = []
    started = time.monotonic()

    async def watch() -> None:
        while True:
            elapsed_s = time.monotonic() - started
            sent = sum(one.at_s <= elapsed_s for one in arrivals)
            readings.extend(read_memory(running.process, elapsed_s=elapsed_s, requests=sent, at_rest=False))
            await asyncio.sleep(_MINUTE_S)

    watching = asyncio.create_task(watch())
    try:
        return await _ask_suite(running, arrivals, text), readings
    finally:
        watching.cancel()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The trace, the text, how fast and how long."""
    parser.add_argument("--trace", type=Path, default=DATA / "azure_conv.csv", help="default: %(default)s")
    parser.add_argument("--text", type=Path, default=default_text(), help="prompts are cut from it")
    parser.add_argument("--dtype", default="bf16", help="of Treadle's weights (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s, instead of shares of saturation")
    parser.add_argument(
        "--duration-s", type=float, default=60.0, help="of each replay (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="replay for so long at --rate, Treadle alone"
    )
    parser.add_argument(
        "--memory-csv", type=Path, help="with --minutes: every process's memory, by the minute"
    )


if __name__ == "__main__":
    raise SystemExit(run("trace_replay", __doc__, measure, add_options, runs=1))
