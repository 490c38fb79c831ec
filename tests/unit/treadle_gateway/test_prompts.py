"""Prompts: tokenised by digest, complaints in the client's words."""

from __future__ import annotations

import pytest

from treadle.errors import DeadlineExceeded, FailedPrecondition, FieldViolation, InvalidArgument, Unavailable
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.deadlines import Deadline
from treadle_gateway.encoded import Tokenized
from treadle_gateway.generation import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from treadle_gateway.models import ServedModel
from treadle_gateway.prompts import tokenize

MODEL = ServedModel(Artifact("sha256:a", "c", "t", 100, 50, GenerationDefaults()), "p", 50, 100, 1)
CHAT = ChatPrompt((ChatMessage("user", "x"),))


class StubTokenizer:
    def __init__(self, error: Exception | None = None, digest: str = "t") -> None:
        self.error, self.digest = error, digest
        self.asked: list[tuple[str, float]] = []

    async def encode(self, model, text, *, timeout_s):
        self.asked.append((model, timeout_s))
        if self.error:
            raise self.error
        return Tokenized((1, 2), self.digest)

    async def render_chat(self, model, chat, *, timeout_s):
        return await self.encode(model, "", timeout_s=timeout_s)


def run(tokenizer, prompt, seconds: float = 60):
    return tokenize(tokenizer, prompt, MODEL, Deadline(seconds), timeout_s=10)


async def test_the_artifact_is_asked_for_within_the_deadline():
    tokenizer = StubTokenizer()
    assert await run(tokenizer, TextPrompt("x")) == (1, 2)
    assert await run(tokenizer, CHAT, 3) == (1, 2)
    assert await run(tokenizer, TokenPrompt((7,))) == (7,)
    assert [model for model, _ in tokenizer.asked] == ["sha256:a"] * 2
    assert tokenizer.asked[0][1] == 10
    assert tokenizer.asked[1][1] <= 3


@pytest.mark.parametrize(
    ("prompt", "theirs", "ours"),
    [
        (TextPrompt("x"), "inputs[0].text", "generation.text"),
        (TextPrompt("x"), "inputs", "generation.text"),
        (TextPrompt("x"), "model", "generation.model"),
        (CHAT, "messages[3].role", "generation.chat.messages[3].role"),
        (CHAT, "template_arguments_json", "generation.chat.template_arguments_json"),
        (CHAT, "model", "generation.model"),
    ],
)
async def test_fields_are_the_clients(prompt, theirs, ours):
    error = InvalidArgument(f"{theirs}: is bad", reason="SO", fields=[FieldViolation(theirs, "is bad")])
    with pytest.raises(InvalidArgument) as caught:
        await run(StubTokenizer(error), prompt)
    assert caught.value.message == f"{ours}: is bad"
    assert caught.value.fields == (FieldViolation(ours, "is bad"),)
    assert caught.value.reason == "SO"


async def test_whose_time_was_up():
    with pytest.raises(Unavailable) as caught:
        await run(StubTokenizer(DeadlineExceeded("late")), CHAT)
    assert caught.value.reason == "TOKENIZER_TIMEOUT"
    with pytest.raises(DeadlineExceeded):
        await run(StubTokenizer(), CHAT, 0)


async def test_a_tokenizer_that_is_away_is_tried_again():
    with pytest.raises(Unavailable) as caught:
        await run(StubTokenizer(Unavailable("no connection")), CHAT)
    assert caught.value.retry_after_s


async def test_a_tokenizer_that_uses_another_one_is_refused():
    with pytest.raises(FailedPrecondition) as caught:
        await run(StubTokenizer(digest="other"), CHAT)
    assert caught.value.reason == "TOKENIZER_MISMATCH"
