"""The suite's errors as JSON, for lines between processes and rows of a database."""

from __future__ import annotations

from typing import Any

from treadle.errors import BY_CODE, FieldViolation, Internal, TreadleError

_MAX_MESSAGE = 2000
"""An error may quote what a stranger's file says, and goes into a line and a row."""


def error_to_json(error: TreadleError) -> dict[str, Any]:
    """An error as an object; `error_from_json` reads it."""
    return {
        "code": error.code,
        "message": error.message[:_MAX_MESSAGE],
        "reason": error.reason,
        "fields": [
            {"field": violation.field, "description": violation.description[:_MAX_MESSAGE]}
            for violation in error.fields
        ],
        "metadata": error.metadata,
        "retry_after_s": error.retry_after_s,
    }


def error_from_json(raw: dict[str, Any]) -> TreadleError:
    """What `error_to_json` wrote."""
    return BY_CODE.get(raw["code"], Internal)(
        raw["message"],
        reason=raw["reason"],
        fields=[FieldViolation(**violation) for violation in raw["fields"]],
        metadata=raw["metadata"],
        retry_after_s=raw.get("retry_after_s"),
    )
