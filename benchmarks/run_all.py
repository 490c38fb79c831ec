"""Runs every benchmark, prints one table, and writes results/latest.json and a chart of it.

    python benchmarks/run_all.py [--only NAME ...] [--quick]      # what `make bench` runs

latest.json is a list of rows: name, treadle, peer, ratio, target, met. With --only the rows of the other
scripts stay as they are. The exit code is 1 where a script failed; targets that are not met are in the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from harness.places import BENCHMARKS, MissingPeer, python, results
from harness.rows import Row
from harness.script import console, print_rows

SCRIPTS = (
    "offline_throughput",
    "single_stream",
    "prefill",
    "trace_replay",
    "service_overhead",
    "prefix_hits",
    "startup",
    "quality",
    "embeddings",
    "device_share",
    "tokenizer_cost",
    "scheduler_cost",
    "tokenizer_cost",
    "memory",
    "model_store",
)
"""In the order of the table of targets."""


def main() -> int:
    """One script after another; the machine does nothing else meanwhile."""
    options = _options()
    raw = results(quick=options.quick) / "raw"
    latest = raw.parent / "latest.json"
    kept = _read(latest)
    for name in options.only or SCRIPTS:
        replaced = {row.name for row in _rows(raw / f"{name}.json")}
        kept = [row for row in kept if row.name not in replaced]
    failed = [name for name in options.only or SCRIPTS if not _run(name, raw, quick=options.quick)]
    rows = [row for name in SCRIPTS for row in _rows(raw / f"{name}.json")]
    rows += [row for row in kept if row.name not in {other.name for other in rows}]
    print_rows(rows)
    latest.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    _draw(latest)
    for name in failed:
        console.print(f"[red]{name} failed[/]: run python benchmarks/{name}.py to see it alone")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SCRIPTS, metavar="NAME", help=f"of: {', '.join(SCRIPTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="a trial with little work; into results/quick/")
    return parser.parse_args()


def _run(name: str, raw: Path, *, quick: bool) -> bool:
    """Whether the script wrote what it read; exit code 1 with a file means targets that are not met."""
    console.rule(name)
    before = time.time()
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *(["--quick"] if quick else [])]
    code = subprocess.run(command, check=False).returncode
    path = raw / f"{name}.json"
    return code in (0, 1) and path.exists() and path.stat().st_mtime >= before and bool(_rows(path))


def _rows(path: Path) -> list[Row]:
    """A script's rows; none where it has not run yet."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def _read(latest: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(latest.read_text())] if latest.exists() else []


def _draw(latest: Path) -> None:
    chart = latest.with_suffix(".svg")
    try:
        interpreter = python("chart")
    except MissingPeer:
        console.print("no chart: matplotlib comes with `make bench-peers`")
        return
    subprocess.run([interpreter, BENCHMARKS / "chart.py", latest, chart], check=True)
    console.print(f"{latest} and {chart.name}")


if __name__ == "__main__":
    raise SystemExit(main())
