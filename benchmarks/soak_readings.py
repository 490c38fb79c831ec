"""What the processes of a running suite hold: memory, open files, threads; and how much that has grown."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

VALKEY = "valkey"
TOTAL = "services"
"""The row of all of the suite's own processes together; Valkey is a row of its own."""

_REPLACED_S = 0.5

_MODULES = {
    "treadle_gateway": "gateway",
    "treadle_registry": "registry",
    "treadle_tokenizer": "tokenizer",
    "treadle_trainer": "trainer",
    "treadle_worker": "worker",
    "treadle_worker.engine_process": "engine",
    "treadle.text.template_process": "template",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One process at one moment; bytes, but for the counts.

    `rss` counts pages that processes share once for each of them, `pss` shares them out, `uss` is the
    process's alone.
    """

    elapsed_s: float
    requests: int
    """How many requests had ended."""
    at_rest: bool
    """Taken with no request under way."""
    process: str
    pid: int
    rss: int
    pss: int
    uss: int
    open_files: int
    """File descriptors, sockets among them."""
    threads: int


def suite_processes(parent: psutil.Process) -> dict[str, psutil.Process]:
    """The suite's processes below `parent` by name: "gateway", "template", "template-2", ..."""
    found: dict[str, psutil.Process] = {}
    counts: dict[str, int] = {}
    for process in sorted(parent.children(recursive=True), key=lambda process: process.pid):
        if kind := _kind(process):
            counts[kind] = counts.get(kind, 0) + 1
            found[kind if counts[kind] == 1 else f"{kind}-{counts[kind]}"] = process
    return found


def _kind(process: psutil.Process) -> str:
    if process.name() in ("valkey-server", "redis-server"):
        return VALKEY
    modules = [after for flag, after in itertools.pairwise(process.cmdline()) if flag == "-m"]
    return _MODULES.get(modules[-1], "") if modules else ""


def read(parent: psutil.Process, *, elapsed_s: float, requests: int, at_rest: bool) -> list[Reading]:
    """One reading a process of the suite below `parent`, the services' sum last."""
    while True:
        try:
            return _read(suite_processes(parent), elapsed_s=elapsed_s, requests=requests, at_rest=at_rest)
        except psutil.NoSuchProcess:
            time.sleep(_REPLACED_S)  # a template's process is being replaced


def _read(
    processes: dict[str, psutil.Process], *, elapsed_s: float, requests: int, at_rest: bool
) -> list[Reading]:
    readings = []
    for name, process in processes.items():
        with process.oneshot():
            memory = process.memory_full_info()
            readings.append(
                Reading(
                    elapsed_s=round(elapsed_s, 1),
                    requests=requests,
                    at_rest=at_rest,
                    process=name,
                    pid=process.pid,
                    rss=memory.rss,
                    pss=memory.pss,
                    uss=memory.uss,
                    open_files=process.num_fds(),
                    threads=process.num_threads(),
                )
            )
    readings.sort(key=lambda reading: reading.process)
    own = [reading for reading in readings if reading.process != VALKEY]
    first = readings[0]
    return [
        *readings,
        Reading(
            elapsed_s=first.elapsed_s,
            requests=requests,
            at_rest=at_rest,
            process=TOTAL,
            pid=0,
            **{
                column: sum(getattr(reading, column) for reading in own)
                for column in ("rss", "pss", "uss", "open_files", "threads")
            },
        ),
    ]


def write_csv(path: Path, readings: Iterable[Reading]) -> None:
    """All readings, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Reading)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, readings))


def _identity(reading: Reading) -> tuple[str, int]:
    return reading.process, 0 if reading.process.startswith("template") else reading.pid


@dataclass(frozen=True, slots=True)
class Growth:
    """A process between two readings at rest."""

    process: str
    before: Reading
    after: Reading

    @property
    def share(self) -> float:
        """Of resident memory: 0.02 is two percent more than before."""
        return self.after.rss / self.before.rss - 1


def growths(before: Sequence[Reading], after: Sequence[Reading]) -> list[Growth]:
    """One a process; raises ValueError where the processes are not the same: one was started again.

    A template's process may be another one: the tokenizer kills it where a rendering takes too long, as it
    may on a machine that is busy with other things.
    """
    if [_identity(one) for one in before] != [_identity(one) for one in after]:
        raise ValueError("the suite's processes are not those of the beginning: one was started again")
    return [Growth(one.process, one, other) for one, other in zip(before, after, strict=True)]
