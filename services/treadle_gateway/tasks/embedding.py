"""Embed: the pooling, the prompt and the length of the vectors, each the client's or else the folder's."""

from __future__ import annotations

from functools import partial

from treadle.errors import FailedPrecondition, FieldViolation, invalid_field
from treadle_gateway.artifact import TaskFacts
from treadle_gateway.tasks.prompted import encode_prompted
from treadle_gateway.tasks.result_bytes import check_size
from treadle_gateway.tasks.task import EmbedTask, Pooling
from treadle_gateway.tasks.texts import TextEncoder
from treadle_gateway.tasks.work import Embeddings, EmbedWork, Plan

_FLOAT_BYTES = 4


async def plan(task: EmbedTask, encoder: TextEncoder) -> Plan:
    """The work; raises InvalidArgument and FailedPrecondition (POOLING_NOT_AVAILABLE)."""
    facts = encoder.model.artifact.facts
    work = EmbedWork(
        pooling=_pooling(task, facts),
        normalize=facts.normalize if task.normalize is None else task.normalize,
        dimensions=_dimensions(task, facts),
    )
    inputs = await encode_prompted(
        encoder,
        _prompt(task, facts),
        [one.text for one in task.inputs],
        [f"inputs[{number}].text" for number in range(len(task.inputs))],
        truncate=task.truncate,
    )
    return Plan(inputs, work, partial(_read, len(inputs), work.dimensions or facts.embedding_dimensions))


def default_pooling(facts: TaskFacts) -> str:
    """The folder's, else the mean."""
    return facts.pooling or "mean"


def _pooling(task: EmbedTask, facts: TaskFacts) -> str:
    if task.pooling == Pooling.UNSPECIFIED:
        return default_pooling(facts)
    asked = Pooling(task.pooling).name.lower()
    if facts.pooling not in ("", asked):
        raise FailedPrecondition(
            f"the model's folder has {facts.pooling} pooling, not {asked}; "
            f"ask for POOLING_{facts.pooling.upper()} or leave it unset",
            reason="POOLING_NOT_AVAILABLE",
            fields=[FieldViolation("pooling", f"must be POOLING_{facts.pooling.upper()} or unset")],
            metadata={"pooling": facts.pooling},
        )
    return asked


def _dimensions(task: EmbedTask, facts: TaskFacts) -> int:
    asked, there = task.dimensions, facts.embedding_dimensions
    if asked is None:
        return 0
    if there and asked > there:
        raise invalid_field(
            "dimensions", f"must be 1 to {there}, which the model has; got {asked}. Leave it unset for all"
        )
    return 0 if asked == there else asked


def _prompt(task: EmbedTask, facts: TaskFacts) -> str:
    """What is put before each text."""
    name = task.prompt_name
    if name and name not in facts.prompts:
        there = ", ".join(sorted(facts.prompts)) or "none"
        raise invalid_field(
            "prompt_name", f"is none of the model's prompts ({there}). Leave it empty for its default"
        )
    return facts.prompts.get(name or facts.default_prompt_name, "")


def _read(rows: int, dimensions: int, data: bytes) -> Embeddings:
    # A folder that does not say how long its vectors are: they are as long as they came.
    dimensions = dimensions or len(data) // (_FLOAT_BYTES * rows)
    check_size(data, _FLOAT_BYTES * rows * dimensions)
    return Embeddings(rows, dimensions, data)
