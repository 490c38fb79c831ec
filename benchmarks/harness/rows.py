"""A row of the table of targets: what was measured, what it is held against, and whether it is met."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Row:
    """One target. A number that could not be had is None, and the target is then not met."""

    name: str
    treadle: float | None
    peer: float | None
    ratio: float | None
    target: str
    """What the ratio must be: ">= 1.1"; or, with a unit, Treadle's number itself: "<= 10 s"."""
    met: bool


def against(name: str, treadle: float | None, other: float | None, target: str) -> Row:
    """A row whose target is about Treadle's number over another: a peer's, or another of its own."""
    ratio = None if treadle is None or not other else treadle / other
    return Row(name, _rounded(treadle), _rounded(other), _rounded(ratio), target, _holds(ratio, target))


def above(name: str, treadle: float | None, other: float | None) -> Row:
    """A row whose target is to be above the best peer; one that achieved nothing is surpassed by any."""
    row = against(name, treadle, other, "> 1.0")
    return replace(row, met=True) if treadle and other == 0 else row


def alone(name: str, value: float | None, target: str) -> Row:
    """A row whose target, which has a unit, is about the number itself."""
    return Row(name, _rounded(value), None, None, target, _holds(value, target))


def _holds(value: float | None, target: str) -> bool:
    comparison, number, *_ = target.split()
    return value is not None and _HOLDS[comparison](value, float(number))


def _rounded(value: float | None) -> float | None:
    """Four significant digits and more are noise; small ratios keep theirs."""
    return None if value is None else float(f"{value:.5g}")
