"""How far a long command is: a bar on standard error, where that is a terminal that shows nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from treadle.cli.console import message_console


class TaskProgress:
    """Counts of lines and tokens, with their rates."""

    def __init__(self, unit: str = "lines") -> None:
        self._unit = unit
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._row: TaskID | None = None
        self._done: Callable[[], float] | None = None

    @contextlib.contextmanager
    def shown(
        self, what: str, total: float | None, done: Callable[[], float] | None, *, quiet: bool
    ) -> Iterator[TaskProgress]:
        """Shows a bar until the block's end; `done` says how much of `total` there is so far."""
        console = message_console()
        self._began, self._done = time.monotonic(), done
        if quiet or not console.is_terminal:
            yield self
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as self._bar:
            self._row = self._bar.add_task(what, total=total, state="")
            try:
                yield self
            finally:
                self._bar = None

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return max(time.monotonic() - self._began, 1e-9)

    def update(self, answered: int, failed: int, tokens: int) -> None:
        """Says how far it is."""
        if self._bar is None or self._row is None:
            return
        self._bar.update(
            self._row,
            completed=None if self._done is None else self._done(),
            state=self.summary(answered, failed, tokens),
        )

    def summary(self, answered: int, failed: int, tokens: int) -> str:
        """The counts in one line, as the end says them, too."""
        done = answered + failed
        wrong = f", {failed} failed" if failed else ""
        return (
            f"{done} {self._unit}{wrong}, {tokens} tokens in {self.seconds:.1f} s: "
            f"{done / self.seconds:.1f} {self._unit}/s"
        )
