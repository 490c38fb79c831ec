"""What the commands of the tasks share: where their lines come from, where their results go, how they end."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from treadle.cli.asking import connected_async, model_for
from treadle.cli.console import message_console
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.line_writer import line_writer
from treadle.cli.task_inputs import LineFormat, LineReader, format_of
from treadle.cli.task_progress import TaskProgress
from treadle.cli.task_run import Counts, Task, TaskRun
from treadle.client import AsyncClient
from treadle.client.task_answer import TaskAnswer

V = TypeVar("V")
A = TypeVar("A", bound=TaskAnswer)

Texts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TEXT]...", help="What to ask; - reads lines from standard input."),
]
File = Annotated[Path | None, typer.Option("--file", "-f", help="Read lines from here.", show_default=False)]
Format = Annotated[
    LineFormat | None, typer.Option("--format", help="Of the lines.", show_default="by the file's extension")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write JSONL here, when all is done.", show_default="standard output"),
]
WithText = Annotated[bool, typer.Option("--with-text", help="Repeat each line's text in its result.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON for a text that was given as argument, too.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, max=256, help="Lines a request.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long; else it fails.")]


@dataclass(frozen=True, slots=True)
class Lines:
    """Where lines come from and results go, as the options say."""

    file: Path | None = None
    format: LineFormat | None = None
    out: Path | None = None
    with_text: bool = False
    as_json: bool = False
    batch_size: int = 32


def is_given(texts: Sequence[str] | None, file: Path | None) -> bool:
    """Whether arguments are the texts, rather than lines to read; a wrong call where nothing is given."""
    if file is not None and texts:
        raise typer.BadParameter("give texts or --file, not both")
    if file is None and not texts:
        raise typer.BadParameter("give a text, --file FILE, or - for standard input")
    return bool(texts) and list(texts or ()) != ["-"]


def run_task(
    make: Callable[[str], Task[V, A]],
    given: Sequence[V] | None,
    lines: Lines,
    *,
    task_name: str,
    model: str,
    address: str,
) -> None:
    """Runs a task over `given`, or over the lines of a file or standard input where that is None.

    `make` gives the Task for a model's name. Exits 1 where a line failed.
    """
    counts = run_until_interrupted(_run(make, given, lines, task_name, model, address))
    if counts.failed:
        raise typer.Exit(1)


async def _run(
    make: Callable[[str], Task[V, A]],
    given: Sequence[V] | None,
    lines: Lines,
    task_name: str,
    model: str,
    address: str,
) -> Counts:
    async with connected_async(address) as client:
        task = make(model or model_for(task_name, await client.models()))
        if given is None:
            return await _over_lines(task, client, lines)
        await _at_once(task, client, given, lines)
        return Counts()


async def _at_once(task: Task[V, A], client: AsyncClient, values: Sequence[V], lines: Lines) -> None:
    """All in one request; raises its error."""

    async def one() -> AsyncIterator[Sequence[V]]:
        yield values

    outcomes = task.ask(client, one(), 1)
    try:
        answer = (await anext(outcomes)).result()
    finally:
        await outcomes.aclose()
    if sys.stdout.isatty() and not lines.as_json and lines.out is None:
        task.show(values, answer)
        return
    with line_writer(lines.out) as writer:
        for index, (value, row) in enumerate(zip(values, task.rows(answer), strict=True)):
            writer.add({"index": index} | (task.fields(value) if lines.with_text else {}) | row)
        await writer.drain()


async def _over_lines(task: Task[V, A], client: AsyncClient, lines: Lines) -> Counts:
    reader = LineReader(lines.file, task.parser, format_of(lines.file, lines.format), lines.batch_size)
    quiet = lines.out is None and sys.stdout.isatty()
    progress = TaskProgress()
    with (
        line_writer(lines.out) as writer,
        progress.shown(task.name, reader.total_bytes, lambda: reader.read_bytes, quiet=quiet),
    ):
        run = TaskRun(task, client, writer, progress, with_text=lines.with_text)
        counts = await run.run(reader.batches())
    summary = progress.summary(counts.answered, counts.failed, counts.tokens)
    message_console().print(f"{summary}  {counts.model_digest}".rstrip(), markup=False)
    return counts
