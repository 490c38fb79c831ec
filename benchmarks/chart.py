"""Draws results/latest.json: how far each target is reached, as a bar a row; 1 is the target.

benchmarks/.peers/chart/bin/python benchmarks/chart.py latest.json latest.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_MET, _MISSED, _INK = "#3a7d5c", "#b4503c", "#333333"
_MOST = 3.0
"""Longer bars are cut, and say so by their number."""


def measured(row: dict[str, Any]) -> float | None:
    """What the target is about: with a unit the number itself, else the ratio."""
    value = row["treadle"] if len(row["target"].split()) == 3 else row["ratio"]
    return None if value is None else float(value)


def reached(row: dict[str, Any]) -> float | None:
    """1 at the target, more beyond it; None for a row without a number."""
    comparison, number, *_ = row["target"].split()
    value = measured(row)
    if value is None:
        return None
    if comparison.startswith(">"):
        return value / float(number)
    return _MOST if value <= 0 else float(number) / value


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the chart as SVG."""
    mpl.rcParams |= {"svg.hashsalt": "treadle", "svg.fonttype": "none"}  # the same rows give the same file
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        length = reached(row)
        color = _MET if row["met"] else _MISSED
        axes.barh(place, min(length or 0.0, _MOST), height=0.6, color=color)
        shown = "not measured" if length is None else f"{measured(row):.3g}"
        axes.text(
            min(length or 0.0, _MOST) + 0.03,
            place,
            f"{shown} (target {row['target']})",
            va="center",
            fontsize=8,
            color=_INK,
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color=_INK, linewidth=1)
    axes.set_xlim(0, _MOST + 0.9)
    axes.set_xticks([0, 1, 2, 3], ["0", "target", "2×", "3×"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("How far each target is reached", fontsize=10, loc="left")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
