"""Score: what a decoder makes of a given continuation, tokenised as lm-evaluation-harness does it."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from functools import partial

from treadle.errors import FailedPrecondition, FieldViolation, invalid_field
from treadle_gateway.bounds import check_each, check_tokenizer
from treadle_gateway.encoded import EncodedText, EncodeOptions
from treadle_gateway.models import ServedModel
from treadle_gateway.tasks.result_bytes import pairs
from treadle_gateway.tasks.task import ScoreInput, ScoreTask
from treadle_gateway.tasks.texts import TextEncoder
from treadle_gateway.tasks.work import ContinuationScore, Plan, Scores, ScoreWork, WorkInput
from treadle_gateway.violations import Violations

Ids = Sequence[int]


async def plan(task: ScoreTask, encoder: TextEncoder) -> Plan:
    """The work; raises InvalidArgument, and FailedPrecondition for another tokenizer's ids, and for an empty
    context where the model has no token to begin with (NO_BEGINNING_TOKEN)."""
    model = encoder.model
    _check_ids(task, model)
    from_text = await _from_texts(task, encoder)
    inputs = []
    for number, one in enumerate(task.inputs):
        field = f"inputs[{number}]"
        context, continuation = from_text.get(number) or _given(one)
        if not len(continuation):
            raise invalid_field(
                f"{field}.continuation", "adds no token to its context; send a text that has at least one"
            )
        if not len(context):
            context = [_beginning(model, f"{field}.context")]
        ids = [*context, *continuation]
        encoder.check(field, ids, "shorten its context")
        inputs.append(WorkInput(ids, first=len(context)))
    return Plan(inputs, ScoreWork(), partial(_read, [one.ids[one.first :] for one in inputs]))


def _check_ids(task: ScoreTask, model: ServedModel) -> None:
    found = Violations()
    for number, one in enumerate(task.inputs):
        for name, given in (
            ("context_token_ids", one.context_ids),
            ("continuation_token_ids", one.continuation_ids),
        ):
            if given is not None:
                check_tokenizer(given, model, f"inputs[{number}].{name}")
                check_each(found, f"inputs[{number}].{name}.ids", given.ids, model)
    found.check()


def _given(one: ScoreInput) -> tuple[Ids, Ids]:
    return (
        one.context_ids.ids if one.context_ids is not None else (),
        one.continuation_ids.ids if one.continuation_ids is not None else (),
    )


async def _from_texts(task: ScoreTask, encoder: TextEncoder) -> Mapping[int, tuple[Ids, Ids]]:
    """By number the ids of each input that is text: of its context, and what the whole has beyond those."""
    numbers = [number for number, one in enumerate(task.inputs) if one.continuation]
    if not numbers:
        return {}
    texts: list[tuple[str, str | None]] = []
    for number in numbers:
        context, continuation = _moved(task.inputs[number])
        texts += [(context, None), (context + continuation, None)]

    def field(theirs: str) -> str:
        found = re.match(r"inputs\[(\d+)\]", theirs)
        if found is None:
            return "inputs"
        at, is_whole = divmod(int(found[1]), 2)
        return f"inputs[{numbers[at]}].{'continuation' if is_whole else 'context'}"

    encoded = await encoder.encode(texts, EncodeOptions(special_tokens=True), field)
    return {
        number: _parted(context.ids, whole)
        for number, context, whole in zip(numbers, encoded[::2], encoded[1::2], strict=True)
    }


def _parted(context: Ids, whole: EncodedText) -> tuple[Ids, Ids]:
    """Context and continuation, without what the tokenizer puts behind a text: neither ends there."""
    end = len(whole.ids)
    while end and whole.special[end - 1]:
        end -= 1
    if not end:
        return context, ()
    context = context[: len(context) - (len(whole.ids) - end)]
    return context, whole.ids[len(context) : end]


def _moved(one: ScoreInput) -> tuple[str, str]:
    """Spaces at the context's end begin the continuation: tokens have them at their front."""
    context = one.context.rstrip()
    return context, one.context[len(context) :] + one.continuation


def _beginning(model: ServedModel, field: str) -> int:
    """The token that stands for an empty context."""
    defaults = model.artifact.defaults
    if defaults.bos_token_id is not None:
        return defaults.bos_token_id
    if defaults.eos_token_ids:
        return defaults.eos_token_ids[0]
    raise FailedPrecondition(
        f"{field}: is empty, and the model names no token that texts begin with; send a context",
        reason="NO_BEGINNING_TOKEN",
        fields=[FieldViolation(field, "must not be empty for this model")],
    )


def _read(continuations: Sequence[Ids], data: bytes) -> Scores:
    best, numbers = pairs(data, sum(map(len, continuations)))
    rows, at = [], 0
    for ids in continuations:
        end = at + len(ids)
        rows.append(ContinuationScore(ids, numbers[at:end], greedy=best[at:end] == array("I", ids)))
        at = end
    return Scores(rows)
