"""Everything about a task that can be judged without knowing its model; all that is wrong is said at once."""

from __future__ import annotations

from collections.abc import Sequence

from treadle_gateway.addressing import MAX_NAME, check_addressed, refuse_adapter
from treadle_gateway.config import GatewayConfig
from treadle_gateway.generation import TokenPrompt
from treadle_gateway.tasks.task import (
    Aggregation,
    ClassifyTask,
    EmbedTask,
    Pooling,
    RerankTask,
    ScoreInput,
    ScoreTask,
    TagTask,
    Task,
    TextInput,
)
from treadle_gateway.violations import Violations, shown


def validate(task: Task, limits: GatewayConfig) -> None:
    """Checks every field.

    Raises InvalidArgument, or Unimplemented for what the contract has and no code serves yet.
    """
    found = Violations()
    check_addressed(found, task.context, limits, prefix="context.")
    match task:
        case EmbedTask():
            _check_embed(found, task, limits)
        case ClassifyTask():
            _check_texts(found, task.inputs, limits)
            _check_some(found, "top_k", task.top_k, "all labels")
        case TagTask():
            _check_tag(found, task, limits)
        case RerankTask():
            _check_rerank(found, task, limits)
        case ScoreTask():
            _check_score(found, task, limits)
    found.check()
    refuse_adapter(task.context, prefix="context.")


def _check_embed(found: Violations, task: EmbedTask, limits: GatewayConfig) -> None:
    _check_texts(found, task.inputs, limits, single="Embed makes a vector of one text; send two inputs")
    found.require(
        task.pooling in list(Pooling),
        "pooling",
        f"{task.pooling} is no Pooling; use MEAN (1), CLS (2), LAST (3) or leave it unset",
    )
    _check_some(found, "dimensions", task.dimensions, "all dimensions")
    found.require(
        len(task.prompt_name) <= MAX_NAME,
        "prompt_name",
        f"must be at most {MAX_NAME} characters; got {shown(task.prompt_name)}",
    )


def _check_tag(found: Violations, task: TagTask, limits: GatewayConfig) -> None:
    _check_texts(found, task.inputs, limits, single="Tag reads one text at a time; send two inputs")
    found.require(
        task.aggregation in list(Aggregation),
        "aggregation",
        f"{task.aggregation} is no Aggregation; use NONE (1), SIMPLE (2), FIRST (3), MAX (4) or none",
    )


def _check_rerank(found: Violations, task: RerankTask, limits: GatewayConfig) -> None:
    count = len(task.documents)
    found.require(bool(task.query), "query", "must not be empty; send at least a word")
    _check_some(found, "top_n", task.top_n, "all documents")
    if not _check_count(found, "documents", count, limits):
        return
    for number, document in enumerate(task.documents):
        if found.full:
            return
        _check_text(found, f"documents[{number}]", document)
    _check_bytes(found, "documents", _size(task.query) * count + sum(map(_size, task.documents)), limits)


def _check_texts(
    found: Violations, inputs: Sequence[TextInput], limits: GatewayConfig, *, single: str = ""
) -> None:
    """`single` is the way out where pairs make no sense; empty: they do."""
    if not _check_count(found, "inputs", len(inputs), limits):
        return
    for number, one in enumerate(inputs):
        if found.full:
            return
        _check_text(found, f"inputs[{number}].text", one.text)
        if one.pair is not None and single:
            found.add(f"inputs[{number}].pair", f"must not be set. {single}")
        elif one.pair is not None:
            _check_text(found, f"inputs[{number}].pair", one.pair)
    _check_bytes(found, "inputs", sum(_size(one.text) + _size(one.pair or "") for one in inputs), limits)


def _check_score(found: Violations, task: ScoreTask, limits: GatewayConfig) -> None:
    if not _check_count(found, "inputs", len(task.inputs), limits):
        return
    for number, one in enumerate(task.inputs):
        if found.full:
            return
        _check_score_input(found, f"inputs[{number}]", one)
    _check_bytes(
        found, "inputs", sum(_size(one.context) + _size(one.continuation) for one in task.inputs), limits
    )
    # Ids are their own count; of texts it is known when they are tokenised.
    given = (ids for one in task.inputs for ids in (one.context_ids, one.continuation_ids))
    count = sum(len(one.ids) for one in given if one is not None)
    found.require(
        count <= limits.max_task_tokens,
        "inputs",
        f"have {count} token ids in all, at most {limits.max_task_tokens} are taken at once; send fewer",
    )


def _check_score_input(found: Violations, field: str, one: ScoreInput) -> None:
    """Both as text or both as ids; no context is a context of either kind."""
    for name, text, ids in (
        ("context", one.context, one.context_ids),
        ("continuation", one.continuation, one.continuation_ids),
    ):
        if ids is None:
            continue
        _check_token_ids(found, f"{field}.{name}_token_ids", ids)
        found.require(not text, f"{field}.{name}", f"must be empty beside {name}_token_ids; send one of them")
    has_ids = one.continuation_ids is not None
    if not has_ids and not one.continuation:
        found.add(f"{field}.continuation", "must not be empty; send at least a word, or its token ids")
    elif has_ids and one.context and one.context_ids is None:
        found.add(f"{field}.context", "must be ids where the continuation is; send context_token_ids")
    elif not has_ids and one.context_ids is not None and not one.context:
        found.add(f"{field}.context_token_ids", "must be text where the continuation is; send context")


def _check_token_ids(found: Violations, field: str, given: TokenPrompt) -> None:
    found.require(bool(given.ids), f"{field}.ids", "must hold at least one id, or not be there")
    found.require(
        len(given.tokenizer_digest) <= MAX_NAME,
        f"{field}.tokenizer_digest",
        'must be a digest ("sha256:…") or empty',
    )


def _check_count(found: Violations, field: str, count: int, limits: GatewayConfig) -> bool:
    good = 1 <= count <= limits.max_task_inputs
    found.require(
        good,
        field,
        f"must be 1 to {limits.max_task_inputs}; got {count}. Send more in several requests, on a stream",
    )
    return good


def _check_text(found: Violations, field: str, text: str) -> None:
    found.require(bool(text), field, "must not be empty; send at least a word")


def _check_bytes(found: Violations, field: str, size: int, limits: GatewayConfig) -> None:
    found.require(
        size <= limits.max_task_bytes,
        field,
        f"must be at most {limits.max_task_bytes} bytes of UTF-8 in all; got {size}. Send fewer a request",
    )


def _check_some(found: Violations, field: str, count: int | None, unset: str) -> None:
    found.require(count != 0, field, f"must be at least 1; got 0. Leave it unset for {unset}")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
