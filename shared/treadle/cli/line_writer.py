"""Results as JSONL, to standard output or to a file that appears whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from treadle.durable_names import fsync_folder
from treadle.errors import invalid_field


class LineWriter:
    """Keeps lines until `drain` writes them."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._writing = asyncio.Lock()

    def add(self, record: dict[str, object]) -> None:
        """One line, not yet written."""
        self._lines.append(json.dumps(record, ensure_ascii=False) + "\n")

    async def drain(self) -> None:
        """Writes what was added; waits in a thread where the reader is slow. Raises OSError."""
        async with self._writing:
            lines, self._lines = self._lines, []
            if lines:
                await asyncio.to_thread(self._write, "".join(lines))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextlib.contextmanager
def line_writer(path: Path | None) -> Iterator[LineWriter]:
    """Writes to `path`, aside and renamed when the block has ended well; None: to standard output.

    A pipe or a device is written to as it is: a rename would put a file in its place. Raises InvalidArgument
    before the block where `path` can be no file.
    """
    if path is None:
        yield LineWriter(sys.stdout)
        return
    if path.is_dir():
        raise invalid_field("out", f"must name a file; {path} is a folder")
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", errors="replace") as stream:
            yield LineWriter(stream)
        return
    path = path.resolve()  # of a link what it leads to is replaced, and not the link
    if not path.parent.is_dir():
        raise invalid_field("out", f"there is no folder {path.parent}; make it first")
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8", errors="replace") as stream:
            yield LineWriter(stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
        fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)
