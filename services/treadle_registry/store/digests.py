"""The digests that name a model: what the numbers, the ids and the defaults depend on, each apart.

A better chat template must not empty a cache or orphan an adapter, so the artifact's digest is taken over
three others. All are over canonical JSON (sorted keys, no spaces), so that they do not depend on how a
file was laid out: one shard or ten, the same weights have the same digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import parse_any_config

_NOT_COMPUTED = frozenset(
    """_name_or_path _commit_hash transformers_version torch_dtype dtype use_cache license bos_token_id
    eos_token_id pad_token_id initializer_range attention_dropout hidden_dropout output_attentions
    output_hidden_states return_dict is_encoder_decoder problem_type
    finetuning_task id2label label2id sentence_transformers
    sbert_ce_default_activation_function""".split()
)
"""Keys of config.json that change no logit."""

_CHANGES_IDS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "bos_token",
    "do_lower_case",
    "eos_token",
    "legacy",
    "pad_token",
    "unk_token",
)
"""Keys of tokenizer_config.json that change what ids a text becomes."""

_AT_RUN_TIME = ("padding", "truncation")
"""Parts of tokenizer.json that belong to a call, not to a tokenizer."""


@dataclass(frozen=True, slots=True)
class Digests:
    """The three parts and the whole, each "sha256:" and 64 hexadecimal digits."""

    compute: str
    tokenizer: str
    presentation: str

    @property
    def artifact(self) -> str:
        """The artifact's name."""
        return digest_json(
            {
                "kind": "artifact/1",
                "compute": self.compute,
                "tokenizer": self.tokenizer,
                "presentation": self.presentation,
            }
        )


def digest_json(value: object) -> str:
    """The digest of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def compute_digest(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """What the numbers depend on.

    `config` is config.json, of a supported model; `tensors` has (dtype, shape, digest of the bytes) by name,
    canonical form.
    """
    ignored, model = _NOT_COMPUTED, parse_any_config(dict(config))
    if isinstance(model, EncoderConfig) and model.first_position:
        # Positions are counted from behind the padding's id.
        ignored -= {"pad_token_id"}
    return digest_json(
        {
            "kind": "compute/1",
            "config": {key: value for key, value in config.items() if key not in ignored},
            "tensors": {name: [dtype, list(shape), data] for name, (dtype, shape, data) in tensors.items()},
        }
    )


def tokenizer_digest(tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> str:
    """What turns text into ids: tokenizer.json and those keys of tokenizer_config.json that change ids."""
    return digest_json(
        {
            "kind": "tokenizer/1",
            "tokenizer": {key: value for key, value in tokenizer.items() if key not in _AT_RUN_TIME},
            "config": {key: tokenizer_config[key] for key in _CHANGES_IDS if key in tokenizer_config},
        }
    )


def presentation_digest(
    chat_templates: Mapping[str, str], generation: Mapping[str, Any], tasks: Mapping[str, Any] | None = None
) -> str:
    """The chat templates by name, the generation defaults, and of an encoder what can be asked of it."""
    defaults = {key: value for key, value in generation.items() if key not in _NOT_PRESENTED}
    presented = {"kind": "presentation/1", "templates": dict(chat_templates), "defaults": defaults}
    return digest_json(presented if tasks is None else presented | {"tasks": tasks})


_NOT_PRESENTED = frozenset({"transformers_version", "_from_model_config"})
