"""A task is prepared for a model that is there, or for the one that has answered it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treadle.errors import FailedPrecondition, InvalidArgument, NotFound, invalid_field
from treadle_gateway.artifact import Artifact, GenerationDefaults, TaskFacts
from treadle_gateway.config import GatewayConfig
from treadle_gateway.deadlines import Deadline
from treadle_gateway.models import ServedModel
from treadle_gateway.tasks.preparation import TaskPreparation
from treadle_gateway.tasks.task import ClassifyTask, EmbedTask, TaskContext, TextInput

FACTS = TaskFacts(tasks=("embed", "rerank"), embedding_dimensions=4)
ARTIFACT = Artifact("sha256:old", "sha256:c", "sha256:t", 100, 64, GenerationDefaults(), "bert", FACTS)
OLD = ServedModel(ARTIFACT, "p-old", 64, 100, 1)
NEW = replace(OLD, artifact=replace(ARTIFACT, digest="sha256:new"), profile="p-new")
TASK = EmbedTask(TaskContext(model="x"), (TextInput("one two"), TextInput("three")))


class Models:
    """Each is gone once its texts are tokenised, but for the last one."""

    def __init__(self, *served: ServedModel) -> None:
        self.served = list(served)
        self.error: Exception | None = None

    async def find(self, name: str, profile: str, request_id: str) -> ServedModel:
        if self.error:
            raise self.error
        return self.served[0]

    async def is_ready(self, model: ServedModel) -> bool:
        if len(self.served) > 1:
            self.served.pop(0)
        return model is self.served[0]

    async def of(self, artifact_digest: str, profile: str) -> ServedModel:
        return replace(OLD, artifact=replace(ARTIFACT, digest=artifact_digest), profile=profile)


def preparation(models: Models, tokenizer, **limits) -> TaskPreparation:
    return TaskPreparation(models, tokenizer, GatewayConfig(**limits))


async def test_a_model_that_went_meanwhile_is_replaced(tokenizer):
    prepared = await preparation(Models(OLD, NEW), tokenizer).prepare(TASK, "id", Deadline(10))
    assert (prepared.model, prepared.prompt_tokens) == (NEW, 7)
    assert len(tokenizer.asked) == 2


async def test_a_result_is_read_for_the_model_that_it_names(tokenizer):
    models = Models(NEW)
    prepared = await preparation(models, tokenizer).prepare_for(TASK, "sha256:gone", "p-gone", Deadline(10))
    assert (prepared.model.artifact.digest, prepared.model.profile) == ("sha256:gone", "p-gone")
    assert prepared.plan.read(bytes(32)).rows == 2


async def test_what_is_wrong_with_the_model_is_said_in_the_tasks_words(tokenizer):
    models = Models(OLD)
    for error in (
        NotFound("no model", fields=invalid_field("generation.model", "is none").fields),
        invalid_field("generation.model", "is none"),
    ):
        models.error = error
        with pytest.raises(type(error)) as caught:
            await preparation(models, tokenizer).prepare(TASK, "id", Deadline(10))
        assert [one.field for one in caught.value.fields] == ["context.model"]
        assert "generation." not in caught.value.message
    models.error = None
    with pytest.raises(FailedPrecondition, match="cannot classify; it can embed, rerank"):
        await preparation(models, tokenizer).prepare(
            ClassifyTask(TASK.context, TASK.inputs), "id", Deadline(10)
        )
    assert not tokenizer.asked


async def test_tokens_of_all_texts_are_bounded(tokenizer):
    with pytest.raises(InvalidArgument, match="inputs: have 7 tokens in all, at most 6") as caught:
        await preparation(Models(OLD), tokenizer, max_task_tokens=6).prepare(TASK, "id", Deadline(10))
    assert [one.field for one in caught.value.fields] == ["inputs"]
