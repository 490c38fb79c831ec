"""Spans as the services know them, with or without OpenTelemetry behind them.

Roots are started from a W3C `traceparent` (a call's metadata, a lane's entry), everything else is a child.
While traces are off every span is NO_SPAN, and nothing is allocated or recorded. Spans say how long and how
many, never what: no prompt, no answer, no error's message.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import ClassVar, Self

TRACEPARENT = "traceparent"
"""The key in a call's metadata."""

AttributeValue = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, AttributeValue]


class SpanKind(enum.Enum):
    """Which side of what a span is, in OpenTelemetry's words."""

    INTERNAL = enum.auto()
    SERVER = enum.auto()
    CLIENT = enum.auto()
    PRODUCER = enum.auto()
    CONSUMER = enum.auto()


class Span:
    """A stretch of a request's time; this one records nothing, and so do its children."""

    recording: ClassVar[bool] = False
    """Ask before making attributes."""

    @property
    def traceparent(self) -> str:
        """What another process needs to go on from here; empty: nothing to go on from."""
        return ""

    def child(
        self, name: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes | None = None
    ) -> Span:
        """A span within this one."""
        return self

    def set(self, attributes: Attributes) -> None:
        """Adds attributes."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something that happens now."""

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span, once; an error is kept by its reason alone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(error)


NO_SPAN = Span()
"""Of everybody while traces are off."""


class Tracer:
    """Starts spans; this one starts none."""

    recording: ClassVar[bool] = False

    def span(
        self,
        name: str,
        *,
        traceparent: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
    ) -> Span:
        """A span that goes on from `traceparent`, or begins a trace where that is empty or malformed."""
        return NO_SPAN

    async def close(self) -> None:
        """Sends what was recorded, if that takes no more than a few seconds."""


_span: contextvars.ContextVar[Span] = contextvars.ContextVar("span", default=NO_SPAN)


@contextlib.contextmanager
def bind_span(span: Span) -> Iterator[None]:
    """Makes `span` this task's current one until the block ends."""
    token = _span.set(span)
    try:
        yield
    finally:
        # A generator that was left in the middle is closed by another task: there is nothing to undo there.
        with contextlib.suppress(ValueError):
            _span.reset(token)


def current_span() -> Span:
    """The span of what this task does now."""
    return _span.get()


def trace_headers() -> Sequence[tuple[str, str]]:
    """The metadata that takes the current trace along with a call."""
    traceparent = _span.get().traceparent
    return ((TRACEPARENT, traceparent),) if traceparent else ()
