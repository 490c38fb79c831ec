"""A prompt as token ids: through the tokenizer, whose complaints come back in the client's words."""

from __future__ import annotations

import re
from collections.abc import Awaitable

from treadle_gateway.bounds import prompt_field
from treadle_gateway.clients import Tokenizer
from treadle_gateway.deadlines import Deadline
from treadle_gateway.encoded import Tokenized
from treadle_gateway.generation import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from treadle_gateway.models import ServedModel
from treadle_gateway.tokenizing import ask_tokenizer


async def tokenize(
    tokenizer: Tokenizer, prompt: Prompt, model: ServedModel, deadline: Deadline, *, timeout_s: float
) -> tuple[int, ...]:
    """The prompt's ids; raises as ask_tokenizer does, with the request's field names."""
    if isinstance(prompt, TokenPrompt):
        return prompt.ids

    def ask(digest: str, limit_s: float) -> Awaitable[Tokenized]:
        if isinstance(prompt, TextPrompt):
            return tokenizer.encode(digest, prompt.text, timeout_s=limit_s)
        return tokenizer.render_chat(digest, prompt, timeout_s=limit_s)

    tokenized = await ask_tokenizer(
        ask, model, deadline, timeout_s=timeout_s, rename=lambda theirs: _field(theirs, prompt)
    )
    return tokenized.ids


def _field(theirs: str, prompt: Prompt) -> str:
    """A field of EncodeRequest or RenderChatRequest as the field of Generation that it was made from."""
    if theirs == "model":
        return "generation.model"
    if isinstance(prompt, ChatPrompt):
        return f"generation.chat.{theirs}"
    if re.match(r"inputs(\[0\])?(\.|$)", theirs):
        return prompt_field(prompt)
    return f"generation.{theirs}"
