"""A tokenizer of words, and plans made with it for a model of the test's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from treadle.errors import invalid_field
from treadle_gateway.artifact import Artifact, GenerationDefaults, TaskFacts
from treadle_gateway.deadlines import Deadline
from treadle_gateway.encoded import EncodedText, EncodedTexts, EncodeOptions, Texts
from treadle_gateway.models import ServedModel
from treadle_gateway.tasks.texts import TextEncoder
from treadle_gateway.tasks.work import Plan

CLS, SEP = 1, 2


class WordTokenizer:
    """An id a word, from 10 on, by its length; special tokens and truncation as BERT has them."""

    def __init__(self, *, special: bool = True) -> None:
        self.special = special
        self.asked: list[tuple[Texts, EncodeOptions]] = []

    def ids(self, text: str) -> list[int]:
        return [10 + len(word) for word in text.split()]

    async def encode_texts(
        self, model: str, texts: Texts, options: EncodeOptions, *, timeout_s: float
    ) -> EncodedTexts:
        self.asked.append((texts, options))
        return EncodedTexts([self._encoded(text, pair, options) for text, pair in texts], "sha256:t")

    def _encoded(self, text: str, pair: str | None, options: EncodeOptions) -> EncodedText:
        first, second = self.ids(text), self.ids(pair or "")
        if not self.special:
            return EncodedText(first, special=[0] * len(first) if options.special_tokens else ())
        special = 2 + (pair is not None)
        if options.cut is not None:
            room = options.cut.max_length - special
            if options.cut.second_only:
                if len(first) + len(second) > room and len(first) >= room:
                    raise invalid_field("inputs[0].pair", "none of it is left")
                second = second[: room - len(first)]
            else:
                first = first[:room]
        ids = [CLS, *first, SEP, *([*second, SEP] if pair is not None else [])]
        return EncodedText(
            ids,
            type_ids=[0] * (len(first) + 2) + [1] * (len(ids) - len(first) - 2) if options.type_ids else (),
            special=[int(one < 10) for one in ids] if options.special_tokens else (),
        )


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def plan(tokenizer: WordTokenizer) -> Callable[..., Awaitable[Plan]]:
    """Plans a task with a module's `plan`, for a model with these facts."""

    async def plan(
        module: Any,
        task: Any,
        *,
        max_model_len: int = 20,
        model_type: str = "bert",
        defaults: dict[str, Any] | None = None,
        **facts: Any,
    ) -> Plan:
        artifact = Artifact(
            "sha256:a",
            "sha256:c",
            "sha256:t",
            0,
            0,
            GenerationDefaults(**(defaults or {})),
            model_type,
            TaskFacts(**facts),
        )
        model = ServedModel(artifact, "p", max_model_len, 100, 1)
        return await module.plan(task, TextEncoder(tokenizer, model, Deadline(10), timeout_s=1))

    return plan
