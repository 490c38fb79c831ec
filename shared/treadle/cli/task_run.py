"""Runs a task over lines: several a request, answers in the lines' order, a bad line alone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from treadle.cli.line_writer import LineWriter
from treadle.cli.task_inputs import Line, Parser
from treadle.cli.task_progress import TaskProgress
from treadle.client import AsyncClient, BatchItem
from treadle.client.task_answer import TaskAnswer
from treadle.errors import DataLoss, InvalidArgument, ResourceExhausted, TreadleError, Unavailable

V = TypeVar("V")
A = TypeVar("A", bound=TaskAnswer)

_WINDOW = 16
_TRIES = 8
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_FIELDS_OF_A_LINE = ("inputs", "query", "documents", "request")
"""Where a request's fault is a line's; elsewhere it is an option's, and every line has it."""
_WORK_FAILED = ("DEADLINE_EXCEEDED", "ABORTED", "INTERNAL", "OUT_OF_RANGE", "CANCELLED")


@dataclass(frozen=True, slots=True)
class Task(Generic[V, A]):
    """What a command asks for, and what it makes of the answers."""

    name: str
    """As ListModels names it."""
    parser: Parser[V]
    ask: Callable[[AsyncClient, AsyncIterable[Sequence[V]], int], AsyncGenerator[BatchItem[A], None]]
    """The outcomes of requests, each of several lines, so many waiting at a time."""
    rows: Callable[[A], Iterable[dict[str, object]]]
    """What an answer says of each of its lines, for JSON."""
    fields: Callable[[V], dict[str, object]]
    """The line itself, for JSON."""
    show: Callable[[Sequence[V], A], None]
    """An answer for people, in a terminal."""


@dataclass(slots=True)
class Counts:
    """What came of the lines."""

    answered: int = 0
    failed: int = 0
    tokens: int = 0
    model_digest: str = ""


class TaskRun(Generic[V, A]):
    """One task over all lines of a source."""

    def __init__(
        self,
        task: Task[V, A],
        client: AsyncClient,
        writer: LineWriter,
        progress: TaskProgress,
        *,
        with_text: bool,
    ) -> None:
        self.counts = Counts()
        self._task = task
        self._client = client
        self._writer = writer
        self._progress = progress
        self._with_text = with_text
        self._pending: deque[list[Line[V]]] = deque()
        self._room = asyncio.Semaphore(2 * _WINDOW)

    async def run(self, batches: AsyncIterator[list[Line[V]]]) -> Counts:
        """Until the source's end. Raises the TreadleError that is no single line's."""
        outcomes = self._task.ask(self._client, self._asked(batches), _WINDOW)
        try:
            async for item in outcomes:
                lines = self._pending[0]
                await self._write(lines, item)
                self._pending.popleft()
                self._room.release()
                self._write_unasked()
                await self._writer.drain()
                self._show()
        finally:
            await outcomes.aclose()
        await self._writer.drain()
        self._show()
        return self.counts

    async def _asked(self, batches: AsyncIterator[list[Line[V]]]) -> AsyncIterator[Sequence[V]]:
        """The requests; batches without a good line are none."""
        async for lines in batches:
            await self._room.acquire()
            self._pending.append(lines)
            if good := _values(lines):
                yield good
            else:
                self._write_unasked()
                await self._writer.drain()

    def _write_unasked(self) -> None:
        """Batches without a good line, as far as it is their turn."""
        while self._pending and not _values(self._pending[0]):
            for line in self._pending.popleft():
                self._add_error(line)
            self._room.release()

    async def _write(self, lines: list[Line[V]], item: BatchItem[A]) -> None:
        good = [line for line in lines if line.error is None]
        outcomes = await self._outcomes(_values(lines), item)
        rows = dict(zip((line.index for line in good), outcomes, strict=True))
        for line in lines:
            row = rows.get(line.index)
            if isinstance(row, dict):
                self.counts.answered += 1
                self._add(line, row)
            else:
                self._add_error(line if row is None else Line(line.index, line.value, row))

    async def _outcomes(
        self, values: Sequence[V], item: BatchItem[A]
    ) -> Sequence[dict[str, object] | TreadleError]:
        """A row or an error for each of a request's lines; raises what is wrong with all there are."""
        item = await self._after_rush(values, item)
        if item.answer is not None:
            self.counts.tokens += item.answer.prompt_tokens
            self.counts.model_digest = item.answer.model_digest
            rows = list(self._task.rows(item.answer))
            if len(rows) != len(values):
                raise DataLoss(
                    f"{len(rows)} results came for {len(values)} lines", reason="ANSWER_INCOMPLETE"
                )
            return rows
        assert item.error is not None
        if not _is_of_a_line(item.error):
            raise item.error
        if len(values) == 1:
            return [item.error]
        outcomes: list[dict[str, object] | TreadleError] = []
        alone = self._task.ask(self._client, _each([value] for value in values), _WINDOW)
        try:
            async for one in alone:
                outcomes += await self._outcomes([values[one.index]], one)
        finally:
            await alone.aclose()
        return outcomes

    async def _after_rush(self, values: Sequence[V], item: BatchItem[A]) -> BatchItem[A]:
        """The outcome once the suite is neither full nor away, or its last refusal."""
        for attempt in range(_TRIES):
            if not isinstance(item.error, ResourceExhausted | Unavailable):
                break
            pause = max(_FIRST_PAUSE_S * 2.0**attempt, item.error.retry_after_s or 0.0)
            await asyncio.sleep(min(pause, _LONGEST_PAUSE_S))
            again = self._task.ask(self._client, _each([values]), 1)
            try:
                item = await anext(again)
            finally:
                await again.aclose()
        return item

    def _add(self, line: Line[V], row: dict[str, object]) -> None:
        text = self._task.fields(line.value) if self._with_text and line.value is not None else {}
        self._writer.add({"index": line.index} | text | row)

    def _add_error(self, line: Line[V]) -> None:
        assert line.error is not None
        self.counts.failed += 1
        self._add(line, {"error": error_record(line.error)})

    def _show(self) -> None:
        self._progress.update(self.counts.answered, self.counts.failed, self.counts.tokens)


def error_record(error: TreadleError) -> dict[str, object]:
    """An error as JSON has it."""
    fields = [{"field": one.field, "description": one.description} for one in error.fields]
    return {"code": error.code, "reason": error.reason, "message": error.message} | (
        {"fields": fields} if fields else {}
    )


def _is_of_a_line(error: TreadleError) -> bool:
    if isinstance(error, ResourceExhausted | Unavailable):
        return False
    if error.fields:
        return any(violation.field.startswith(_FIELDS_OF_A_LINE) for violation in error.fields)
    # What depends on the work itself: a deadline, a poisoned request, a number that is none.
    return isinstance(error, InvalidArgument) or error.code in _WORK_FAILED


def _values(lines: list[Line[V]]) -> list[V]:
    return [line.value for line in lines if line.error is None and line.value is not None]


async def _each(batches: Iterable[Sequence[V]]) -> AsyncIterator[Sequence[V]]:
    for batch in batches:
        yield batch
