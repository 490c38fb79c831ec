"""How far a job is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """What a job does now."""

    CHECKING = "checking"
    DOWNLOADING = "downloading"
    COPYING = "copying"
    CONVERTING = "converting"
    PUBLISHING = "publishing"
    VERIFYING = "verifying"


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes and items (files, artifacts) are those of the stage's own work."""

    stage: Stage
    done_bytes: int = 0
    total_bytes: int = 0
    done_items: int = 0
    total_items: int = 0


Report = Callable[[Progress], None]


def unheard(progress: Progress) -> None:
    """Progress that nobody wants."""


class StageMeter:
    """Adds up the bytes of a stage and reports them."""

    def __init__(self, report: Report, stage: Stage, total_bytes: int) -> None:
        self._report, self._stage, self._total, self._done = report, stage, total_bytes, 0
        self.add(0)

    def add(self, count: int) -> None:
        """Says that `count` more bytes are done."""
        self._done += count
        self._report(Progress(self._stage, self._done, self._total))
