"""How long from `make serve` to the first token, with everything installed and the model imported?

Treadle: `treadle up`, which is what `make serve` runs, to the first token of a client that waits for it. The
peers' servers, started with their own commands, are told for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import time

from harness import models, servers, suite
from harness.places import MissingPeer
from harness.prompts import cut
from harness.rows import alone
from harness.script import Record, run

from treadle.client import Client

TARGET = "<= 10 s"
PROMPT = 16


def measure(record: Record) -> None:
    """Each start is a new one; the first, which may fill the disk's cache, counts like the others."""
    options = record.options
    models.home()
    ours = [_suite_s(options.dtype) for _ in range(options.runs)]
    record.runs["treadle_s"] = ours
    record.note(f"treadle: {', '.join(f'{seconds:.1f}' for seconds in ours)} s")
    if options.peers and not options.quick:
        for name in servers.PEERS:
            try:
                seconds = _peer_s(name)
            except MissingPeer as error:
                record.note(str(error))
                continue
            record.runs[f"{name}_s"] = seconds
            record.note(f"{name}: {seconds:.1f} s")
    record.add(alone("make serve to the first token", statistics.median(ours), TARGET))


def _suite_s(dtype: str) -> float:
    begun = time.monotonic()
    with suite.started(suite.engine_variables(dtype)) as process:
        address = suite.until_up(process).address
        with (
            Client(address, model=models.ALIAS) as client,
            client.stream(token_ids=cut("start", 1, PROMPT)[0], max_new_tokens=1) as stream,
        ):
            next(iter(stream))
            return time.monotonic() - begun


def _peer_s(name: servers.PeerName) -> float:
    begun = time.monotonic()
    with servers.peer(name) as server:
        server.first_token(cut("start", 1, PROMPT)[0])
        return time.monotonic() - begun


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is started."""
    parser.add_argument("--dtype", default="bf16", help="of Treadle's weights (default: %(default)s)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="start Treadle alone")


if __name__ == "__main__":
    raise SystemExit(run("startup", __doc__, measure, add_options))
