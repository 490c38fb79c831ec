"""What a model bounds: ids by its vocabulary, lengths by its context."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.errors import FailedPrecondition, FieldViolation
from treadle_gateway.generation import ChatPrompt, Generation, Prompt, TextPrompt, TokenPrompt
from treadle_gateway.models import ServedModel
from treadle_gateway.violations import Violations


def prompt_field(prompt: Prompt | None) -> str:
    """The field that holds the prompt."""
    match prompt:
        case TextPrompt():
            return "generation.text"
        case ChatPrompt():
            return "generation.chat.messages"
        case _:
            return "generation.token_ids.ids"


def check_task(task: str, model: ServedModel, field: str) -> None:
    """Raises FailedPrecondition (TASK_NOT_SUPPORTED), naming what the model can do, unless it can `task`."""
    tasks = model.artifact.facts.tasks
    if task not in tasks:
        able = ", ".join(tasks)
        raise FailedPrecondition(
            f"the model cannot {task}; it can {able}. ListModels says what each model can do",
            reason="TASK_NOT_SUPPORTED",
            fields=[FieldViolation(field, f"names a model that can {able}")],
            metadata={"tasks": able},
        )


def check_ids(generation: Generation, model: ServedModel) -> None:
    """Checks every id of the request against the logits' width, before the prompt is tokenised.

    Raises InvalidArgument, or FailedPrecondition (TOKENIZER_MISMATCH) for another tokenizer's ids.
    """
    prompt, found = generation.prompt, Violations()
    if isinstance(prompt, TokenPrompt):
        check_tokenizer(prompt, model, "generation.token_ids")
        check_each(found, "generation.token_ids.ids", prompt.ids, model)
    for token_id in generation.sampling.logit_bias:
        _check_id(found, f"generation.sampling.logit_bias[{token_id}]", token_id, model)
    check_each(found, "generation.stopping.stop_token_ids", generation.stopping.stop_token_ids, model)
    found.check()


def check_tokenizer(prompt: TokenPrompt, model: ServedModel, field: str) -> None:
    """Raises FailedPrecondition (TOKENIZER_MISMATCH) for another tokenizer's ids."""
    theirs, ours = prompt.tokenizer_digest, model.artifact.tokenizer_digest
    if theirs and theirs != ours:
        raise FailedPrecondition(
            f"the ids were made by tokenizer {theirs}, but the model has {ours}; "
            "tokenise with the model's own, or send text",
            reason="TOKENIZER_MISMATCH",
            fields=[FieldViolation(f"{field}.tokenizer_digest", f"must be {ours} or empty")],
            metadata={"tokenizer_digest": ours},
        )


def check_each(found: Violations, field: str, ids: Sequence[int], model: ServedModel) -> None:
    """Checks each id against the logits' width."""
    if ids and max(ids) < model.vocab_size:
        return
    for number, token_id in enumerate(ids):
        if found.full:
            return
        _check_id(found, f"{field}[{number}]", token_id, model)


def _check_id(found: Violations, field: str, token_id: int, model: ServedModel) -> None:
    found.require(
        token_id < model.vocab_size,
        field,
        f"must be below the vocabulary's size, {model.vocab_size}; got {token_id}",
    )


def check_lengths(generation: Generation, prompt_ids: Sequence[int], model: ServedModel) -> None:
    """Checks the tokenised prompt, and what is asked for, against the context; raises InvalidArgument."""
    found, field = Violations(), prompt_field(generation.prompt)
    context, length = model.max_model_len, len(prompt_ids)
    found.require(length > 0, field, "has no tokens; send a prompt that has at least one")
    if length and max(prompt_ids) >= model.vocab_size:
        found.add(
            field,
            f"has token {max(prompt_ids)}, which the model has no row for: its vocabulary's size is "
            f"{model.vocab_size}",
        )
    if length >= context:
        found.add(
            field,
            f"has {length} tokens, but prompt and answer together have {context}: at most {context - 1} "
            "for the prompt. Shorten it",
        )
    found.check()
    _check_answer(found, generation, context - length, length)
    found.check()


def _check_answer(found: Violations, generation: Generation, left: int, length: int) -> None:
    field = "generation.stopping"
    for name in ("max_new_tokens", "min_new_tokens"):
        asked = getattr(generation.stopping, name)
        found.require(
            asked is None or asked <= left,
            f"{field}.{name}",
            f"must be at most {left}, which is what the context leaves after {length} prompt tokens; "
            f"got {asked}. Leave it unset for all that is left, or shorten the prompt",
        )
