"""A request is prepared for a model that is there: looked at again where that took long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treadle.errors import Unavailable
from treadle.queue.keys import RequestKeys
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.deadlines import Deadline
from treadle_gateway.encoded import Tokenized
from treadle_gateway.generation import Generation, TextPrompt
from treadle_gateway.models import ServedModel
from treadle_gateway.preparation import Preparation

ARTIFACT = Artifact("sha256:a", "sha256:c", "sha256:t", 100, 64, GenerationDefaults())
OLD = ServedModel(ARTIFACT, "p-old", 64, 100, 1)
NEW = replace(OLD, artifact=replace(ARTIFACT, digest="sha256:b"), profile="p-new")


class Models:
    """The old model goes while the first prompt is tokenised."""

    def __init__(self, *served: ServedModel) -> None:
        self.served = list(served)
        self.ids: list[str] = []

    async def find(self, name: str, profile: str, request_id: str) -> ServedModel:
        self.ids.append(request_id)
        if not self.served:
            raise Unavailable("nobody has it", reason="MODEL_NOT_SERVED")
        return self.served[0]

    async def is_ready(self, model: ServedModel) -> bool:
        return model is self.served[-1]


class Tokenizer:
    def __init__(self, models: Models) -> None:
        self.models = models
        self.asked: list[str] = []

    async def encode(self, model: str, text: str, *, timeout_s: float) -> Tokenized:
        self.asked.append(model)
        if len(self.models.served) > 1:
            self.models.served.pop(0)
        return Tokenized((1, 2, 3), "sha256:t")


async def prepare(models: Models, tokenizer: Tokenizer):
    preparation = Preparation(models, tokenizer, "gw", tokenizer_timeout_s=1)
    generation = Generation(model="x", prompt=TextPrompt("hello"))
    return await preparation.prepare(generation, RequestKeys("default", "id"), Deadline.earliest(10))


async def test_a_model_that_went_meanwhile_is_replaced_with_its_tokenizer():
    models = Models(OLD, NEW)
    tokenizer = Tokenizer(models)
    entry = await prepare(models, tokenizer)
    assert (entry.profile, entry.artifact_digest) == ("p-new", "sha256:b")
    assert tokenizer.asked == ["sha256:a", "sha256:b"]
    assert models.ids == ["id", "id"]


async def test_a_model_that_stays_is_found_once():
    models = Models(OLD)
    entry = await prepare(models, Tokenizer(models))
    assert entry.profile == "p-old"
    assert len(models.ids) == 1


async def test_where_nobody_has_it_any_more_that_is_said():
    models = Models(OLD)
    tokenizer = Tokenizer(models)

    async def gone(model: ServedModel) -> bool:
        models.served.clear()
        return False

    models.is_ready = gone
    with pytest.raises(Unavailable) as caught:
        await prepare(models, tokenizer)
    assert caught.value.reason == "MODEL_NOT_SERVED"
    assert len(tokenizer.asked) == 1
