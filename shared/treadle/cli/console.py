"""How the command speaks: results on standard output, everything else on standard error."""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.text import Text

from treadle.errors import TreadleError

_PLAIN_WIDTH = 160
"""Columns where there is no terminal to ask."""


def result_console() -> Console:
    """Standard output; plain where it is no terminal."""
    return _console(stderr=False)


def message_console() -> Console:
    """Standard error, for progress, notes and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, highlight=False, width=None if stream.isatty() else _PLAIN_WIDTH, soft_wrap=True
    )


def tolerate_any_text() -> None:
    """Lets a terminal without Unicode show a model's text with question marks instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def printable(text: str) -> str:
    """A model's own words, which do not steer the terminal."""
    return "".join(mark if mark.isprintable() else "?" for mark in text)


def write_text(text: str) -> None:
    """A piece of an answer to standard output, at once and as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_error(error: TreadleError) -> None:
    """One error: what is wrong, the stable reason, the fields at fault, the way out."""
    console = message_console()
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    lines = [("reason", error.reason if error.reason == error.code else f"{error.code}, {error.reason}")]
    fields = [f"{violation.field}: {violation.description}" for violation in error.fields]
    lines += [("field", field) for field in fields if field != error.message]
    if error.retry_after_s is not None:
        lines.append(("again", f"in {error.retry_after_s:g} s"))
    if way_out := _way_out(error):
        lines.append(("try", way_out))
    for name, text in lines:
        console.print(Text.assemble((f"  {name:<8}", "dim"), text))


def _way_out(error: TreadleError) -> str:
    if error.code == "UNAVAILABLE" and error.reason == error.code:
        return "nobody answers there: start a suite with `treadle up`, or name its gateway with --address"
    if error.code == "NOT_FOUND":
        return "`treadle models list` shows what the store has, `treadle status` what is served"
    if error.code == "DATA_LOSS":
        return "`treadle models show NAME` says where the model came from, `treadle models import` repairs it"
    return ""
