"""What the engine refuses to run. The gateway has checked it all before: this is the second lock."""

from __future__ import annotations

import math
from collections.abc import Iterable

from treadle_worker.engine_protocol import AddRequest, AddTask, SamplingParams, TaskInput

_POOLINGS = ("mean", "cls", "last")
_ACTIVATIONS = ("", "softmax", "sigmoid")


def check_request(request: AddRequest, vocab_size: int, max_model_len: int) -> str | None:
    """Why the request cannot be run, or None.

    No id may pass the logits' width, since ids index tensors; no number may turn logits into nonsense.
    """
    if not request.prompt_token_ids:
        return "the prompt is empty"
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    if len(request.prompt_token_ids) >= max_model_len or num_tokens > max_model_len:
        return f"{num_tokens} tokens leave no room in the context of {max_model_len}"
    for name, ids in (
        ("prompt", request.prompt_token_ids),
        ("output", request.output_token_ids),
        ("stop_token_ids", request.sampling.stop_token_ids),
        ("logit_bias", request.sampling.logit_bias),
    ):
        if not _within(ids, vocab_size):
            return f"{name}: a token id lies outside the vocabulary of {vocab_size}"
    return _check_sampling(request.sampling)


def check_task(
    task: AddTask, vocab_size: int, max_model_len: int, type_vocab_size: int | None = None
) -> str | None:
    """Why the task cannot be computed, or None. Only an encoder's engine knows its `type_vocab_size`."""
    pools = task.task == "embed" or (task.task == "rank" and task.pooling != "")
    if pools and task.pooling not in _POOLINGS:
        return f"pooling: {task.pooling!r} is none of {', '.join(_POOLINGS)}"
    if task.activation not in _ACTIVATIONS:
        return f"activation: {task.activation!r} is neither softmax nor sigmoid"
    if task.dimensions < 0:
        return f"dimensions: {task.dimensions} is out of range"
    least = 2 if task.task == "rank" and pools else 1
    if len(task.inputs) < least:
        return f"inputs: {len(task.inputs)} where at least {least} is asked for"
    for index, one in enumerate(task.inputs):
        if error := _check_input(one, task.task == "score", vocab_size, max_model_len, type_vocab_size):
            return f"inputs[{index}]: {error}"
    return None


def _check_input(
    one: TaskInput, scored: bool, vocab_size: int, max_model_len: int, type_vocab_size: int | None
) -> str | None:
    length = len(one.token_ids)
    if not length:
        return "it is empty"
    if length > max_model_len:
        return f"{length} tokens are more than the {max_model_len} that the model takes"
    if not _within(one.token_ids, vocab_size):
        return f"a token id lies outside the vocabulary of {vocab_size}"
    if one.type_ids and len(one.type_ids) != length:
        return f"{len(one.type_ids)} type ids for {length} tokens"
    if type_vocab_size is not None and not _within(one.type_ids, type_vocab_size):
        return f"a type id lies outside the model's {type_vocab_size}"
    if not int(scored) <= one.first < length:
        return f"first: {one.first} is not from {int(scored)} to {length - 1}"
    return None


def _within(ids: Iterable[int], vocab_size: int) -> bool:
    return min(ids, default=0) >= 0 and max(ids, default=0) < vocab_size


def _check_sampling(params: SamplingParams) -> str | None:
    bounds = {
        "temperature": (params.temperature, 0.0, 1e6),
        "top_k": (params.top_k, 0, math.inf),
        "top_p": (params.top_p, 0.0, 1.0),
        "min_p": (params.min_p, 0.0, 1.0),
        "repetition_penalty": (params.repetition_penalty, 1e-6, 1e6),
        "presence_penalty": (params.presence_penalty, -1e6, 1e6),
        "frequency_penalty": (params.frequency_penalty, -1e6, 1e6),
        "logprobs": (params.logprobs or 0, 0, math.inf),
    }
    for name, (value, low, high) in bounds.items():
        if not low <= value <= high:  # a NaN fails this, too
            return f"{name}: {value} is out of range"
    if not all(abs(bias) <= 1e6 for bias in params.logit_bias.values()):
        return "logit_bias: a value is out of range"
    return None
