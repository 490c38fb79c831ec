"""Shows what a local suite does: live rows in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from treadle.client import ImportProgress
from treadle.local import ServiceState

_STYLES = {
    ServiceState.READY: "green",
    ServiceState.RESTARTING: "yellow",
    ServiceState.FAILED: "red",
}


class Report:
    """The observer of a local suite (`treadle.local.Observer`)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        self._rows: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Shows rows that change in place until the block's end, where there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<18}"),
            _ImportBar(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=self._console) as self._live:
            try:
                yield
            finally:
                self._live = None
                self._rows.clear()

    def service(self, name: str, state: ServiceState, detail: str = "") -> None:
        """A service changed its state."""
        if state in (ServiceState.STOPPING, ServiceState.STOPPED) and not detail:
            return
        style = _STYLES.get(state, "dim")
        if self._live is None:
            if state is not ServiceState.STARTING:
                self._console.print(Text.assemble(f"{name:<12} ", (str(state), style), f"  {detail}"))
            return
        row = self._row(name)
        self._live.update(row, state=f"[{style}]{state}[/] [dim]{detail}[/]")
        if state is ServiceState.READY:
            self._live.update(row, total=1, completed=1)

    def importing(self, model: str, progress: ImportProgress) -> None:
        """An import went on."""
        files = f"{progress.done_files} of {progress.total_files} files" if progress.total_files else ""
        self.working(f"import {model}", progress.stage, progress.done_bytes, progress.total_bytes, files)

    def working(self, what: str, stage: str, done_bytes: int, total_bytes: int, detail: str = "") -> None:
        """Something that takes as long as its bytes are many went on; its last stage is "done"."""
        if self._live is None:
            if stage != self._stages.get(what):
                self._console.print(f"{what:<18} {stage}")
            self._stages[what] = stage
            return
        total = total_bytes or None
        size = f" [dim]{total_bytes / 1e6:.0f} MB[/]" if total else ""
        if detail:
            size += f" [dim]{detail}[/]"
        done = total if stage == "done" else done_bytes
        self._live.update(self._row(what), total=total, completed=done, state=f"{stage}{size}", bar=True)

    def note(self, text: str) -> None:
        """Something that people should know."""
        self._console.print(f"note: {text}")

    def _row(self, name: str) -> TaskID:
        assert self._live is not None
        if name not in self._rows:
            self._rows[name] = self._live.add_task(name, total=None, state="", bar=False)
        return self._rows[name]


class _ImportBar(ProgressColumn):
    """A bar for the rows that count bytes, nothing for the others."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(bar_width=30)

    def render(self, task: Task) -> object:  # type: ignore[override]
        return self._bar.render(task) if task.fields.get("bar") else Text("")
