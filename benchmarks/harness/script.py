"""What every script does alike: options, a record of what it read, a table, an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from harness.engine import EngineFailed, EngineProcess, Name
from harness.places import MissingPeer, results
from harness.rows import Row

_BUSY = 0.1
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)


class Record:
    """What a script reads: rows with targets, every single run, and notes for people."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.rows: list[Row] = []
        self.runs: dict[str, Any] = {}
        """By what was measured; anything that JSON has."""
        self.notes: list[str] = []
        self._started = time.monotonic()

    def add(self, *rows: Row) -> None:
        """Rows of the table, in their order."""
        self.rows += rows

    def note(self, text: str) -> None:
        """Says something, now and in the file."""
        self.notes.append(text)
        console.print(text)

    @contextlib.contextmanager
    def engine(
        self, name: Name, dtype: str = "bf16", options: Sequence[str] = ()
    ) -> Iterator[EngineProcess | None]:
        """A loaded engine, or None with a note where it is missing here or does not load."""
        try:
            process = EngineProcess(name, dtype, options=options)
        except (MissingPeer, EngineFailed) as error:
            self.note(str(error))
            yield None
            return
        self.runs.setdefault("engines", {})[process.label] = process.ready
        with process:
            yield process

    @contextlib.contextmanager
    def engines(
        self, wanted: Sequence[tuple[Name, str]], options: Sequence[str] = ()
    ) -> Iterator[list[EngineProcess]]:
        """Those of the engines that could be loaded, each a name and a dtype."""
        with contextlib.ExitStack() as stack:
            entered = [stack.enter_context(self.engine(name, dtype, options)) for name, dtype in wanted]
            yield [engine for engine in entered if engine]

    def write(self) -> Path:
        """Writes `raw/NAME.json` with everything that was read."""
        path = results(quick=self.options.quick) / "raw" / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "script": self.name,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "took_s": round(time.monotonic() - self._started, 1),
            "machine": machine(),
            "options": {key: _plain(value) for key, value in vars(self.options).items()},
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "runs": self.runs,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def run(
    name: str,
    description: str,
    measure: Callable[[Record], None],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    *,
    runs: int = 3,
) -> int:
    """Measures, prints the table, writes the file; the exit code is 1 where a target is not met."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=runs, help="turns of each engine (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a trial with little work; writes to results/quick/"
    )
    add_options(parser)
    record = Record(name, parser.parse_args())
    if record.options.quick:
        record.options.runs = 1
    if (share := others_share()) > _BUSY:
        record.note(f"[yellow]others use {share:.0%} of this machine: do not quote these figures[/]")
    try:
        measure(record)
    finally:
        record.write()
    print_rows(record.rows)
    return 0 if all(row.met for row in record.rows) else 1


def others_share() -> float:
    """How much of all cores is in use before anything of ours runs; 1 is all of them."""
    return psutil.cpu_percent(interval=1.0) / 100


def print_rows(rows: Sequence[Row]) -> None:
    """The table of targets."""

    def shown(number: float | None) -> str:
        return "–" if number is None else f"{number:.4g}"

    table = Table("target", "treadle", "against", "ratio", "due", "met", box=None)
    for row in rows:
        numbers = map(shown, (row.treadle, row.peer, row.ratio))
        table.add_row(row.name, *numbers, row.target, "[green]yes[/]" if row.met else "[red]no[/]")
    console.print(table)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, instruction sets, cores, memory."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kept = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "processor": facts.get("model name", platform.processor()),
        "instructions": [flag for flag in facts.get("flags", "").split() if flag in kept],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": sys.version.split()[0],
    }


def _plain(value: object) -> object:
    """What JSON has; of a path its last part, as where it lies is the machine's."""
    return value.name if isinstance(value, Path) else value
