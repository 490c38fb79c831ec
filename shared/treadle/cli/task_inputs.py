"""The lines of a file or of standard input, read in a thread, bounded, each with what is wrong with it."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from treadle.errors import InvalidArgument, TreadleError, invalid_field

V = TypeVar("V")

LineFormat = Literal["text", "jsonl"]
MAX_LINE_BYTES = 8 << 20
"""A longer line is an error of its own; no more of it is kept."""
_READ_BYTES = 256 << 10
_BATCH_BYTES = 1 << 20
_BATCHES_AHEAD = 2
_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class Line(Generic[V]):
    """One line: what it asks, or why it cannot be asked."""

    index: int
    value: V | None
    error: TreadleError | None


@dataclass(frozen=True, slots=True)
class Parser(Generic[V]):
    """What a line of each format means; both raise InvalidArgument, naming the field."""

    of_text: Callable[[str], V] | None
    """None: this command's lines have several fields, so they are JSONL."""
    of_record: Callable[[object], V]

    def parse(self, line: str, line_format: LineFormat) -> V:
        """Raises InvalidArgument."""
        if line_format == "text":
            assert self.of_text is not None
            return self.of_text(line)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"the line is no JSON: {error}", reason="MALFORMED_LINE") from error
        return self.of_record(record)


def format_of(path: Path | None, given: LineFormat | None) -> LineFormat:
    """What was said, else by the file's extension: JSONL for .jsonl, .ndjson and .json."""
    if given is not None:
        return given
    return "jsonl" if path is not None and path.suffix.lower() in _JSONL_SUFFIXES else "text"


class LineSplitter:
    """Lines out of pieces of bytes. A line longer than the bound is None, and is not kept."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._too_long = False

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The lines that end in `data`, without their ends."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            yield self._line(part)
            self._rest, self._too_long = b"", False
        self._keep(rest)

    def finish(self) -> Iterator[bytes | None]:
        """The last line, where nothing ended it."""
        if self._rest or self._too_long:
            yield self._line(b"")
            self._rest, self._too_long = b"", False

    def _line(self, last: bytes) -> bytes | None:
        self._keep(last)
        return None if self._too_long else self._rest.removesuffix(b"\r")

    def _keep(self, part: bytes) -> None:
        self._too_long = self._too_long or len(self._rest) + len(part) > self._max_bytes
        self._rest = b"" if self._too_long else self._rest + part


class LineReader(Generic[V]):
    """Reads lines in a thread as they are taken, in batches of `batch_size` and a megabyte at most.

    What a pipe has so far is a batch, too: who writes slowly is answered at once.
    """

    def __init__(
        self, path: Path | None, parser: Parser[V], line_format: LineFormat, batch_size: int
    ) -> None:
        """`path` None: standard input. Raises OSError where it cannot be opened."""
        if line_format == "text" and parser.of_text is None:
            raise invalid_field("format", "must be jsonl: a line has several fields")
        if path is not None and path.is_dir():
            raise invalid_field("file", f"must name a file; {path} is a folder")
        self._descriptor = 0 if path is None else os.open(path, os.O_RDONLY)
        self._owned = path is not None
        self._parser = parser
        self._format = line_format
        self._batch_size = batch_size
        self._queue: asyncio.Queue[list[Line[V]] | Exception | None] = asyncio.Queue()
        self._room = threading.Semaphore(_BATCHES_AHEAD)
        self._stopped = False
        self._next_index = 0
        status = os.fstat(self._descriptor)
        self.total_bytes = status.st_size if self._owned else None
        """Of the file; None: nobody knows how much there will be."""
        self.read_bytes = 0

    async def batches(self) -> AsyncIterator[list[Line[V]]]:
        """Until the end; raises OSError, and InvalidArgument for UTF-16."""
        # A thread of our own and a daemon: one that waits for a pipe must not hold up the command's end.
        thread = threading.Thread(
            target=self._read, args=(asyncio.get_running_loop(),), name="lines", daemon=True
        )
        thread.start()
        try:
            while (batch := await self._queue.get()) is not None:
                self._room.release()
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            self._stopped = True
            self._room.release()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        def put(batch: list[Line[V]] | Exception | None) -> bool:
            self._room.acquire()
            if self._stopped:
                return False
            loop.call_soon_threadsafe(self._queue.put_nowait, batch)
            return True

        try:
            if all(put(batch) for batch in self._all_batches()):
                put(None)
        except (OSError, InvalidArgument) as error:
            put(error)
        except RuntimeError:
            return  # the loop is closed: nobody takes them any more
        finally:
            if self._owned:
                os.close(self._descriptor)

    def _all_batches(self) -> Iterator[list[Line[V]]]:
        splitter = LineSplitter()
        while data := os.read(self._descriptor, _READ_BYTES):
            if self.read_bytes == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                # Its lines would pass for texts full of zeros.
                raise InvalidArgument(
                    "the lines are UTF-16; write them in UTF-8, as with `iconv -f UTF-16 -t UTF-8`",
                    reason="ENCODING_NOT_SUPPORTED",
                )
            self.read_bytes += len(data)
            yield from self._batched(splitter.feed(data))
        yield from self._batched(splitter.finish())

    def _batched(self, lines: Iterator[bytes | None]) -> Iterator[list[Line[V]]]:
        batch: list[Line[V]] = []
        size = 0
        for raw in lines:
            length = 0 if raw is None else len(raw)
            if batch and (len(batch) == self._batch_size or size + length > _BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(self._line(raw))
            size += length
        if batch:
            yield batch

    def _line(self, raw: bytes | None) -> Line[V]:
        index, self._next_index = self._next_index, self._next_index + 1
        try:
            if raw is None:
                raise InvalidArgument(
                    f"the line is longer than {MAX_LINE_BYTES} bytes", reason="LINE_TOO_LONG"
                )
            text = raw.decode("utf-8-sig" if index == 0 else "utf-8")
            return Line(index, self._parser.parse(text, self._format), None)
        except UnicodeDecodeError as error:
            wrong = InvalidArgument(f"the line is no UTF-8: {error.reason}", reason="MALFORMED_LINE")
            return Line(index, None, wrong)
        except TreadleError as error:
            return Line(index, None, error)
