"""Classify: one or two sentences, labels that exclude one another or do not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from treadle.errors import invalid_field
from treadle_gateway.encoded import EncodeOptions
from treadle_gateway.tasks.result_bytes import floats
from treadle_gateway.tasks.task import ClassifyTask
from treadle_gateway.tasks.texts import TextEncoder, input_field
from treadle_gateway.tasks.work import Classifications, ClassifyWork, Plan

_MAX_NUMBERS = 1 << 20
"""Of all labels of all inputs: each is an object of the answer."""


async def plan(task: ClassifyTask, encoder: TextEncoder) -> Plan:
    """The work; raises InvalidArgument."""
    facts = encoder.model.artifact.facts
    if (count := len(task.inputs) * len(facts.labels)) > _MAX_NUMBERS:
        raise invalid_field(
            "inputs",
            f"have {count} labels in all, {len(facts.labels)} each; at most {_MAX_NUMBERS} are computed at "
            "once. Send fewer a request",
        )
    multi_label = facts.multi_label if task.multi_label is None else task.multi_label
    # Of one label alone a softmax would be 1.
    activation = "sigmoid" if multi_label or len(facts.labels) == 1 else "softmax"
    texts = [(one.text, one.pair) for one in task.inputs]
    has_pairs = any(one.pair is not None for one in task.inputs)
    options = EncodeOptions(encoder.cut(task.truncate), type_ids=has_pairs and encoder.has_types)
    encoded = await encoder.encode(texts, options, input_field)
    inputs = [
        encoder.work_input(f"inputs[{number}]" + (".text" if pair is None else ""), one)
        for number, (one, (_, pair)) in enumerate(zip(encoded, texts, strict=True))
    ]
    return Plan(inputs, ClassifyWork(activation), partial(_read, len(inputs), facts.labels, task.top_k))


def _read(rows: int, labels: tuple[str, ...], top_k: int | None, data: bytes) -> Classifications:
    width = len(labels)
    numbers = floats(data, rows * width)
    return Classifications(
        [_best(labels, numbers[at : at + width], top_k) for at in range(0, rows * width, width or 1)]
    )


def _best(labels: tuple[str, ...], numbers: Sequence[float], top: int | None) -> list[tuple[str, float]]:
    """The labels with their numbers, best first; of equal ones the first label first."""
    order = sorted(range(len(numbers)), key=numbers.__getitem__, reverse=True)
    return [(labels[index], numbers[index]) for index in order[:top]]
