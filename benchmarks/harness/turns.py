"""A B A B: contenders take turns in one run, so that a machine that changes its pace changes it for all."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from harness.engine import EngineProcess
from harness.script import console

_T = TypeVar("_T")


def alternate(contenders: Mapping[str, Callable[[int], _T]], turns: int) -> dict[str, list[_T]]:
    """Each contender's readings, in `turns` rounds; each is given the number of the turn."""
    readings: dict[str, list[_T]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name, measure in contenders.items():
            readings[name].append(measure(turn))
    return readings


def paces(
    engines: Sequence[EngineProcess], once: Callable[[EngineProcess, int], float], turns: int
) -> dict[str, list[float]]:
    """Each engine's readings by its label; `once` is given the engine and the number of the turn."""
    return alternate({engine.label: functools.partial(once, engine) for engine in engines}, turns)


def median(readings: Mapping[str, list[float]], name: str, unit: str) -> float | None:
    """The median of a contender's readings, said with their spread; None for one that is not there."""
    if name not in readings:
        return None
    values, middle = readings[name], statistics.median(readings[name])
    console.print(f"{name}: {middle:.4g} {unit} (of {len(values)}: {min(values):.4g} to {max(values):.4g})")
    return middle
