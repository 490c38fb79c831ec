"""What can be asked of an encoder: by its head, its labels, and sentence-transformers' files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle.models.encoder_config import EncoderConfig
from treadle_registry.formats.sentence_transformers import (
    SETTINGS,
    SentenceFiles,
    rank_activation,
    read_sentence_files,
)
from treadle_registry.store.task_facts import TaskFacts

_MAX_LABELS, _MAX_LABEL = 10_000, 200
"""Characters of a label."""
_MAX_ALL_LABELS = 256 << 10
"""Bytes of all labels as JSON: they go through every line and message that tells of the artifact."""
_LABELS = "config.json: id2label"
_WAY_OUT = "name each output of the head once, from 0 on, or leave id2label out (LABEL_0, LABEL_1, …)"
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def read_encoder(
    files: Mapping[str, Path],
    raw: Mapping[str, Any],
    config: EncoderConfig,
    tokenizer_config: Mapping[str, Any],
) -> tuple[SentenceFiles, TaskFacts]:
    """What a folder's files say, and what can be asked of its model.

    `raw` is config.json, which `config` was read from. Raises FailedPrecondition and InvalidArgument as
    `read_sentence_files` does, and for labels that do not fit (CORRUPT_CONFIG).
    """
    said = read_sentence_files(files, config.hidden_size, is_classifier=bool(config.head))
    longest = _longest(said, config, tokenizer_config)
    if not config.head:
        return said, TaskFacts(
            tasks=("embed", "rerank"),
            pooling=said.pooling,
            normalize=said.normalize,
            embedding_dimensions=config.hidden_size,
            prompts=said.prompts,
            default_prompt_name=said.default_prompt_name,
            skip_prompt=said.skip_prompt,
            similarity=said.similarity,
            max_input_tokens=longest,
        )
    if said.default_prompt_name:
        raise FailedPrecondition(
            f"{SETTINGS}: default_prompt_name {said.default_prompt_name!r:.80} would go before every text of "
            "a classifier, which is not done; set it to null, and put the prompt before the texts you send",
            reason="UNSUPPORTED_MODULE",
        )
    labels = read_labels(raw, config.num_labels)
    if config.head == "token":
        return said, TaskFacts(tasks=("tag",), labels=labels, max_input_tokens=longest)
    multi_label = _is_multi_label(raw, len(labels))
    ranks = len(labels) == 1
    return said, TaskFacts(
        tasks=("classify", "rerank") if ranks else ("classify",),
        labels=labels,
        multi_label=multi_label,
        rank_activation=_rank_activation(said, raw) if ranks else "",
        max_input_tokens=longest,
    )


def read_labels(raw: Mapping[str, Any], outputs: int) -> tuple[str, ...]:
    """The names of the head's outputs, in their order.

    Raises InvalidArgument (CORRUPT_CONFIG) where id2label does not name each of the `outputs` once.
    """
    if outputs > _MAX_LABELS:
        raise _no_labels(f"the head has {outputs} outputs; at most {_MAX_LABELS} are taken")
    names = raw.get("id2label")
    if names is None:
        return tuple(f"LABEL_{number}" for number in range(outputs))
    if not isinstance(names, Mapping):
        raise _no_labels(f"must be an object; got {names!r:.80}")
    if len(names) != outputs:
        raise _no_labels(f"has {len(names)} labels, and the head has {outputs} outputs")
    if missing := [number for number in range(outputs) if str(number) not in names]:
        raise _no_labels(f"has no label for output {missing[0]}")
    labels = [names[str(number)] for number in range(outputs)]
    for label in labels:
        if not isinstance(label, str) or not 0 < len(label) <= _MAX_LABEL:
            raise _no_labels(f"a label must be a text of 1 to {_MAX_LABEL} characters; got {label!r:.80}")
    if len(set(labels)) < outputs:
        twice = next(label for number, label in enumerate(labels) if label in labels[:number])
        raise _no_labels(f"{twice!r:.80} is there twice")
    if (size := len(json.dumps(labels))) > _MAX_ALL_LABELS:
        raise _no_labels(f"has {size} bytes of labels; at most {_MAX_ALL_LABELS} are taken")
    return tuple(labels)


def labels_beside(outputs: int, found: int) -> InvalidArgument:
    """What is said of a head whose weights have other outputs than config.json means."""
    return _no_labels(f"means {outputs} labels, and the head's weights have {found} outputs")


def _no_labels(what: str) -> InvalidArgument:
    return InvalidArgument(f"{_LABELS} {what}; {_WAY_OUT}", reason="CORRUPT_CONFIG")


def _is_multi_label(raw: Mapping[str, Any], outputs: int) -> bool:
    problem = raw.get("problem_type")
    if problem is not None and problem not in _PROBLEMS:
        raise InvalidArgument(
            f"config.json: problem_type is {problem!r:.80}; it may be {', '.join(_PROBLEMS)}, or left out",
            reason="CORRUPT_CONFIG",
        )
    if problem == "regression" and outputs > 1:
        raise FailedPrecondition(
            f"config.json: problem_type is regression with {outputs} outputs, which are no labels; supported "
            "is one output",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    return problem == "multi_label_classification"


def _rank_activation(said: SentenceFiles, raw: Mapping[str, Any]) -> str:
    """As sentence-transformers' CrossEncoder finds it: its own file, config.json, then a sigmoid."""
    if said.activation:
        return rank_activation(said.activation, SETTINGS)
    own = raw.get("sentence_transformers")
    newer = own.get("activation_fn") if isinstance(own, Mapping) else None
    for key, name in {
        "sentence_transformers.activation_fn": newer,
        "sbert_ce_default_activation_function": raw.get("sbert_ce_default_activation_function"),
    }.items():
        if name is not None:
            return rank_activation(str(name), f"config.json: {key}")
    return "sigmoid"


def _longest(said: SentenceFiles, config: EncoderConfig, tokenizer_config: Mapping[str, Any]) -> int:
    """Tokens of a text; what a tokenizer without a limit says is some enormous number."""
    limits = [config.max_input_tokens, said.max_seq_length, tokenizer_config.get("model_max_length")]
    return min(limit for limit in limits if type(limit) is int and limit > 0)
