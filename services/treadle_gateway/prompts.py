"""A prompt as token ids: through the tokenizer, whose complaints come back in the client's words."""

from __future__ import annotations

import re

from treadle.errors import DeadlineExceeded, FailedPrecondition, FieldViolation, TreadleError, Unavailable
from treadle_gateway.bounds import prompt_field
from treadle_gateway.clients import Tokenizer
from treadle_gateway.deadlines import Deadline, out_of_time
from treadle_gateway.encoded import Tokenized
from treadle_gateway.generation import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from treadle_gateway.models import ServedModel


async def tokenize(
    tokenizer: Tokenizer, prompt: Prompt, model: ServedModel, deadline: Deadline, *, timeout_s: float
) -> tuple[int, ...]:
    """The prompt's ids.

    Raises what the tokenizer raises, with the request's field names; DeadlineExceeded when the request's
    time is up, and Unavailable (TOKENIZER_TIMEOUT) when the tokenizer's is.
    """
    if isinstance(prompt, TokenPrompt):
        return prompt.ids
    limit_s = min(timeout_s, deadline.remaining_s)
    if limit_s <= 0:
        raise out_of_time()
    # The digest, not the alias: the alias may move between the two calls.
    digest = model.artifact.digest
    try:
        if isinstance(prompt, TextPrompt):
            tokenized = await tokenizer.encode(digest, prompt.text, timeout_s=limit_s)
        else:
            tokenized = await tokenizer.render_chat(digest, prompt, timeout_s=limit_s)
    except DeadlineExceeded as error:
        if deadline.passed:
            raise out_of_time() from error
        raise Unavailable(
            "the tokenizer did not answer in time; try again", reason="TOKENIZER_TIMEOUT", retry_after_s=1.0
        ) from error
    except TreadleError as error:
        raise _in_the_clients_words(error, prompt) from error
    return _checked(tokenized, model)


def _checked(tokenized: Tokenized, model: ServedModel) -> tuple[int, ...]:
    ours = model.artifact.tokenizer_digest
    if tokenized.tokenizer_digest != ours:
        raise FailedPrecondition(
            f"the tokenizer service used {tokenized.tokenizer_digest}, but the model has {ours}",
            reason="TOKENIZER_MISMATCH",
        )
    return tokenized.ids


def _in_the_clients_words(error: TreadleError, prompt: Prompt) -> TreadleError:
    fields = [FieldViolation(_field(one.field, prompt), one.description) for one in error.fields]
    message = error.message
    for theirs, ours in zip(error.fields, fields, strict=True):
        message = message.replace(f"{theirs.field}: ", f"{ours.field}: ", 1)
    retry_after_s = error.retry_after_s
    if isinstance(error, Unavailable) and retry_after_s is None:
        message, retry_after_s = f"the tokenizer is away; try again ({message})", 1.0
    return type(error)(
        message,
        reason=error.reason,
        fields=fields,
        retry_after_s=retry_after_s,
        metadata=error.metadata,
    )


def _field(theirs: str, prompt: Prompt) -> str:
    """A field of EncodeRequest or RenderChatRequest as the field of Generation that it was made from."""
    if theirs == "model":
        return "generation.model"
    if isinstance(prompt, ChatPrompt):
        return f"generation.chat.{theirs}"
    if re.match(r"inputs(\[0\])?(\.|$)", theirs):
        return prompt_field(prompt)
    return f"generation.{theirs}"
