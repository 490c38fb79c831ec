"""The suite's errors. Each has a gRPC status's name, a stable reason and, where it helps, the field at fault.

Servicers turn them into `google.rpc.Status` with details, and clients turn those back: nothing in between
knows gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request and what is wrong with it, with the way out."""

    field: str
    description: str


class TreadleError(Exception):
    """Base of everything the suite says went wrong.

    `code` is the gRPC status's name; `reason` is stable and meant for programs, `message` for people.
    """

    code: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        fields: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.fields = tuple(fields)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidArgument(TreadleError):
    """The request is wrong whatever the system's state."""

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_FIELD"


class NotFound(TreadleError):
    """A model, alias, job or request that is not there."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExists(TreadleError):
    """The same id with another payload."""

    code = "ALREADY_EXISTS"
    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(TreadleError):
    """The system's state does not allow it; trying again does not help."""

    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class OutOfRange(TreadleError):
    """Past the end of what was written."""

    code = "OUT_OF_RANGE"
    default_reason = "OUT_OF_RANGE"


class Aborted(TreadleError):
    """A compare-and-swap that lost, or a request that was given up."""

    code = "ABORTED"
    default_reason = "ABORTED"


class ResourceExhausted(TreadleError):
    """Full; with the time after which to try again."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(TreadleError):
    """Something that is needed is away; try again."""

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(TreadleError):
    """The time was up."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(TreadleError):
    """Somebody called it off."""

    code = "CANCELLED"
    default_reason = "CANCELLED"


class DataLoss(TreadleError):
    """A stored file is not what it was."""

    code = "DATA_LOSS"
    default_reason = "DATA_LOSS"


class Unimplemented(TreadleError):
    """In the contract, but no code yet."""

    code = "UNIMPLEMENTED"
    default_reason = "UNIMPLEMENTED"


class Internal(TreadleError):
    """A fault of the suite's own."""

    code = "INTERNAL"
    default_reason = "INTERNAL"


class Unauthenticated(TreadleError):
    """No key, or one that nobody knows."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(TreadleError):
    """A known key that may not do this."""

    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


BY_CODE: Mapping[str, type[TreadleError]] = {kind.code: kind for kind in TreadleError.__subclasses__()}


def invalid_field(field: str, description: str, *, reason: str = "") -> InvalidArgument:
    """An InvalidArgument that names one field; the description says the bound and the way out."""
    return InvalidArgument(
        f"{field}: {description}", reason=reason, fields=(FieldViolation(field, description),)
    )
