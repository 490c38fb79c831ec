"""What is wrong with a request, field by field, said at once.

One InvalidArgument with up to MAX_VIOLATIONS fields, each with its bound and the way out.
"""

from __future__ import annotations

from treadle.errors import FieldViolation, InvalidArgument

MAX_VIOLATIONS = 16

_SHOWN = 64


class Violations:
    """Collects what is wrong, field by field."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """One more field that is wrong; beyond MAX_VIOLATIONS they are dropped."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(field, description))

    def require(self, good: bool, field: str, description: str) -> None:
        """Adds the field unless `good`."""
        if not good:
            self.add(field, description)

    @property
    def full(self) -> bool:
        """True when no more are kept."""
        return len(self._found) >= MAX_VIOLATIONS

    def check(self) -> None:
        """Raises InvalidArgument with all that was found."""
        if self._found:
            first, more = self._found[0], len(self._found) - 1
            rest = f" (and {more} more)" if more else ""
            raise InvalidArgument(f"{first.field}: {first.description}{rest}", fields=self._found)


def shown(value: str) -> str:
    """The start of a client's string, safe to quote in an error."""
    return repr(value[:_SHOWN]) + ("…" if len(value) > _SHOWN else "")
