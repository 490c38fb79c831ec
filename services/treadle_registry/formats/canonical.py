"""The canonical form: the same files whatever a model came as, and the manifest over them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from treadle.errors import InvalidArgument
from treadle.models.config_values import MAX_CONFIG_BYTES
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import (
    AnyConfig,
    expected_tensors,
    optional_tensors,
    parse_any_config,
)
from treadle.text.chat_template import MAX_TEMPLATE_BYTES
from treadle_registry.formats.json_files import json_bytes
from treadle_registry.formats.safetensors_file import TensorDigests
from treadle_registry.formats.sentence_transformers import sentence_files
from treadle_registry.names import check_file_name
from treadle_registry.store.digests import Digests, compute_digest, presentation_digest, tokenizer_digest
from treadle_registry.store.manifest import DtypeShare, GenerationDefaults, Manifest, ModelFacts
from treadle_registry.store.staging import Staging
from treadle_registry.store.task_facts import TaskFacts, decoder_facts

WEIGHTS = "canonical/model.safetensors"
_DEFAULT = "default"
_MAX_TEMPLATES = 32


@dataclass(frozen=True, slots=True)
class TextParts:
    """Everything of a model but its weights."""

    config: Mapping[str, Any]
    tokenizer_json: bytes
    tokenizer: Mapping[str, Any]
    """`tokenizer_json`, decoded."""
    tokenizer_config: Mapping[str, Any]
    chat_templates: Mapping[str, str]
    generation: Mapping[str, Any]
    license: str = ""
    dtypes: tuple[DtypeShare, ...] = ()
    """What the weights are stored as."""
    task_facts: TaskFacts | None = None
    """Of an encoder; None: those of every model that generates."""


def facts_of(parts: TextParts) -> ModelFacts:
    """The facts; raises what `parse_config` raises."""
    facts = facts_of_config(parts.config, parse_any_config(dict(parts.config)))
    return replace(
        facts,
        license=parts.license,
        has_chat_template=_DEFAULT in parts.chat_templates,
        dtypes=parts.dtypes,
    )


def task_facts_of(parts: TextParts) -> TaskFacts:
    """What can be asked of the model."""
    return parts.task_facts or decoder_facts(facts_of(parts).context_length)


def facts_of_config(raw: Mapping[str, Any], config: AnyConfig) -> ModelFacts:
    """What config.json alone tells of a model of a supported type."""
    classes = raw.get("architectures")
    tensors = expected_tensors(config) | optional_tensors(config)
    context = config.max_input_tokens if isinstance(config, EncoderConfig) else config.max_position_embeddings
    return ModelFacts(
        model_type=config.model_type,
        architecture=str(classes[0])[:100] if isinstance(classes, list) and classes else "",
        parameters=sum(math.prod(shape) for shape in tensors.values()),
        vocab_size=config.vocab_size,
        context_length=context,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        quantization=config.quantization,
    )


def check_parts(parts: TextParts) -> None:
    """Refuses what the services that load it would refuse, or could not bear.

    Raises InvalidArgument: CORRUPT_CONFIG, FILE_TOO_LARGE, PATH_OUTSIDE for a template's name.
    """
    facts_of(parts)
    generation_defaults(parts.generation, parts.config)
    if (size := len(json_bytes(parts.config))) > MAX_CONFIG_BYTES:
        raise _too_large("config.json", size, MAX_CONFIG_BYTES)
    if len(parts.chat_templates) > _MAX_TEMPLATES:
        raise InvalidArgument(
            f"the model has {len(parts.chat_templates)} chat templates; at most {_MAX_TEMPLATES} are taken",
            reason="FILE_TOO_LARGE",
        )
    for name, template in parts.chat_templates.items():
        check_file_name(name, "the list of chat templates")
        if (size := len(template.encode())) > MAX_TEMPLATE_BYTES:
            raise _too_large(f"the chat template {name}", size, MAX_TEMPLATE_BYTES)


def _too_large(what: str, size: int, most: int) -> InvalidArgument:
    return InvalidArgument(f"{what} has {size} bytes; at most {most} are taken", reason="FILE_TOO_LARGE")


def write_text_parts(staging: Staging, parts: TextParts) -> None:
    """Stages every canonical file but the weights, of parts that were checked."""
    staging.write("canonical/config.json", json_bytes(parts.config))
    staging.write("canonical/tokenizer.json", parts.tokenizer_json)
    staging.write("canonical/tokenizer_config.json", json_bytes(parts.tokenizer_config))
    staging.write("canonical/generation_config.json", json_bytes(parts.generation))
    for name, template in parts.chat_templates.items():
        path = "chat_template" if name == _DEFAULT else f"additional_chat_templates/{name}"
        staging.write(f"canonical/{path}.jinja", template.encode())
    if parts.task_facts is not None:
        for name, content in sentence_files(parts.task_facts).items():
            staging.write(f"canonical/{name}", json_bytes(content))


def manifest_of(staging: Staging, parts: TextParts, tensors: TensorDigests, source: str) -> Manifest:
    """The manifest over what was staged."""
    return Manifest(
        digests=Digests(
            compute=compute_digest(parts.config, tensors),
            tokenizer=tokenizer_digest(parts.tokenizer, parts.tokenizer_config),
            presentation=presentation_digest(
                parts.chat_templates,
                parts.generation,
                parts.task_facts.presented() if parts.task_facts else None,
            ),
        ),
        facts=facts_of(parts),
        defaults=generation_defaults(parts.generation, parts.config),
        files=staging.listed("canonical"),
        source_files=staging.listed("source"),
        source=source,
        create_time=time.time(),
        task_facts=task_facts_of(parts),
    )


def generation_defaults(generation: Mapping[str, Any], config: Mapping[str, Any]) -> GenerationDefaults:
    """Sampling defaults out of generation_config.json; raises InvalidArgument (CORRUPT_CONFIG)."""
    sampled = generation.get("do_sample") is not False
    eos = _ids(generation, "eos_token_id") or _ids(config, "eos_token_id")
    return GenerationDefaults(
        temperature=_number(generation, "temperature", 0, 100) if sampled else 0.0,
        top_k=_whole(generation, "top_k"),
        top_p=_number(generation, "top_p", 0, 1),
        min_p=_number(generation, "min_p", 0, 1),
        repetition_penalty=_number(generation, "repetition_penalty", 0, 100),
        # An id past the logits is never drawn, and an engine takes none.
        eos_token_ids=tuple(token for token in eos if token < config["vocab_size"]),
        bos_token_id=next(iter(_ids(generation, "bos_token_id") or _ids(config, "bos_token_id")), None),
        pad_token_id=next(iter(_ids(generation, "pad_token_id") or _ids(config, "pad_token_id")), None),
    )


def _number(raw: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _corrupt(name, f"must be a number from {low:g} to {high:g}; got {value!r}")
    return float(value)


def _whole(raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise _corrupt(name, f"must be a whole number; got {value!r}")
    return value


def _ids(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = raw.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > 1024 or not all(type(item) is int and 0 <= item < 1 << 32 for item in ids):
        # Some configurations write -1 for "none".
        if ids == [-1]:
            return ()
        raise _corrupt(name, f"must be token ids; got {str(value)[:100]}")
    return tuple(ids)


def _corrupt(name: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"generation_config.json: {name} {problem}", reason="CORRUPT_CONFIG")
