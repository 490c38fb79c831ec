"""A question to the tokenizer, within the request's time; its complaints come in the client's words."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from treadle.errors import DeadlineExceeded, FailedPrecondition, FieldViolation, TreadleError, Unavailable
from treadle_gateway.deadlines import Deadline, out_of_time
from treadle_gateway.models import ServedModel


class _Answer(Protocol):
    @property
    def tokenizer_digest(self) -> str: ...


A = TypeVar("A", bound=_Answer)


async def ask_tokenizer(
    ask: Callable[[str, float], Awaitable[A]],
    model: ServedModel,
    deadline: Deadline,
    *,
    timeout_s: float,
    rename: Callable[[str], str],
) -> A:
    """What `ask` answers, given the model's digest and the seconds it may take.

    `rename` turns a field of the tokenizer's request into the client's field that it was made from. Raises
    what the tokenizer raises; DeadlineExceeded when the request's time is up, Unavailable (TOKENIZER_TIMEOUT)
    when the tokenizer's is, and FailedPrecondition (TOKENIZER_MISMATCH) where it has another tokenizer.
    """
    limit_s = min(timeout_s, deadline.remaining_s)
    if limit_s <= 0:
        raise out_of_time()
    ours = model.artifact.tokenizer_digest
    try:
        # The digest, not the alias: the alias may move between the two calls.
        answer = await ask(model.artifact.digest, limit_s)
    except DeadlineExceeded as error:
        if deadline.passed:
            raise out_of_time() from error
        raise Unavailable(
            "the tokenizer did not answer in time; try again", reason="TOKENIZER_TIMEOUT", retry_after_s=1.0
        ) from error
    except TreadleError as error:
        raise _explained(renamed(error, rename)) from error
    if answer.tokenizer_digest != ours:
        raise FailedPrecondition(
            f"the tokenizer service used {answer.tokenizer_digest}, but the model has {ours}",
            reason="TOKENIZER_MISMATCH",
        )
    return answer


def _explained(error: TreadleError) -> TreadleError:
    if isinstance(error, Unavailable) and error.retry_after_s is None:
        error.message = f"the tokenizer is away; try again ({error.message})"
        error.retry_after_s = 1.0
    return error


def renamed(error: TreadleError, rename: Callable[[str], str]) -> TreadleError:
    """The error with other names of its fields."""
    fields = [FieldViolation(rename(one.field), one.description) for one in error.fields]
    message = error.message
    for theirs, ours in zip(error.fields, fields, strict=True):
        message = message.replace(f"{theirs.field}: ", f"{ours.field}: ", 1)
    return type(error)(
        message,
        reason=error.reason,
        fields=fields,
        retry_after_s=error.retry_after_s,
        metadata=error.metadata,
    )
