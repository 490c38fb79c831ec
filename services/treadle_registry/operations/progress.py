"""How far an import is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """What an import does now."""

    CHECKING = "checking"
    COPYING = "copying"
    CONVERTING = "converting"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """Bytes are those of the stage's own work: copied, then written."""

    stage: Stage
    done_bytes: int = 0
    total_bytes: int = 0


Report = Callable[[ImportProgress], None]


class StageMeter:
    """Adds up the bytes of a stage and reports them."""

    def __init__(self, report: Report, stage: Stage, total_bytes: int) -> None:
        self._report, self._stage, self._total, self._done = report, stage, total_bytes, 0
        self.add(0)

    def add(self, count: int) -> None:
        """Says that `count` more bytes are done."""
        self._done += count
        self._report(ImportProgress(self._stage, self._done, self._total))
