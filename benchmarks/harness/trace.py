"""Arrivals and lengths of real requests, read from a CSV and stretched to a rate."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, and how long its prompt and its answer are."""

    at_s: float
    """Since the first one."""
    prompt_tokens: int
    new_tokens: int


def read(path: Path, longest: int) -> list[Arrival]:
    """A trace in the form of Azure's LLM inference traces; `longest` bounds prompt and answer together.

    Raises ValueError for a file with other columns.
    """
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if missing := set(_COLUMNS) - set(rows.fieldnames or ()):
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
        arrivals: list[Arrival] = []
        start: datetime | None = None
        for row in rows:
            at = datetime.fromisoformat(row["TIMESTAMP"])
            start = start or at
            new = min(max(1, int(row["GeneratedTokens"])), longest - 1)
            prompt = min(max(1, int(row["ContextTokens"])), longest - new)
            arrivals.append(Arrival((at - start).total_seconds(), prompt, new))
    return arrivals


def at_rate(arrivals: Sequence[Arrival], rate: float, duration_s: float) -> list[Arrival]:
    """As many of the first arrivals as come at `rate` a second in the duration, their bursts kept.

    The trace begins anew where it is too short.
    """
    count = max(2, round(rate * duration_s))
    span = arrivals[-1].at_s
    laps = itertools.chain.from_iterable(
        (replace(one, at_s=one.at_s + lap * span) for one in arrivals) for lap in itertools.count()
    )
    taken = list(itertools.islice(laps, count))
    stretch = (count - 1) / rate / taken[-1].at_s
    return [replace(one, at_s=one.at_s * stretch) for one in taken]
