"""Every architecture by its `model_type`: a new one adds a row here. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from treadle.models import bert, distilbert, llama, roberta
from treadle.models.config import DECODERS, ModelConfig, parse_config
from treadle.models.config_values import model_of, read_raw
from treadle.models.encoder_config import EncoderConfig
from treadle.models.encoder_tensors import EncoderNames, Shape
from treadle.models.module_tree import ModuleTree

AnyConfig = ModelConfig | EncoderConfig


@dataclass(frozen=True, slots=True)
class _Encoder:
    parse: Callable[[Mapping[str, Any]], EncoderConfig]
    names: EncoderNames
    reads_type_ids: bool
    has_word_pieces: bool


_ENCODERS: Mapping[str, _Encoder] = {
    "bert": _Encoder(bert.parse, bert.NAMES, reads_type_ids=True, has_word_pieces=True),
    "roberta": _Encoder(roberta.parse, roberta.NAMES, reads_type_ids=False, has_word_pieces=False),
    "xlm-roberta": _Encoder(
        roberta.parse_xlm, roberta.XLM_NAMES, reads_type_ids=False, has_word_pieces=False
    ),
    "distilbert": _Encoder(distilbert.parse, distilbert.NAMES, reads_type_ids=False, has_word_pieces=True),
}

ENCODERS = tuple(_ENCODERS)
"""Those that see a text whole, and generate nothing."""
MODEL_TYPES = (*DECODERS, *ENCODERS)
"""All that can be served."""


def parse_any_config(raw: object) -> AnyConfig:
    """A decoded config.json of any supported model.

    Raises FailedPrecondition (UNSUPPORTED_ARCHITECTURE, UNSUPPORTED_QUANTIZATION, REMOTE_CODE) for what no
    code here computes, and InvalidArgument (CORRUPT_CONFIG) for values that cannot be.
    """
    model_type, values = model_of(raw, MODEL_TYPES)
    encoder = _ENCODERS.get(model_type)
    return parse_config(values) if encoder is None else encoder.parse(values)


def read_any_config(folder: Path) -> AnyConfig:
    """The configuration of a canonical folder; see `parse_any_config` for the errors."""
    return parse_any_config(read_raw(folder))


def is_encoder(config: AnyConfig) -> TypeGuard[EncoderConfig]:
    """Whether it sees a text whole, and generates nothing."""
    return isinstance(config, EncoderConfig)


def reads_type_ids(model_type: str) -> bool:
    """Whether a pair's texts are told apart by type ids; to other models their tokenizers' mean nothing."""
    return model_type in _ENCODERS and _ENCODERS[model_type].reads_type_ids


def has_word_pieces(model_type: str) -> bool:
    """Whether its tokenizers know words; of other models a word is what a space is before."""
    return model_type in _ENCODERS and _ENCODERS[model_type].has_word_pieces


def encoder_names(config: EncoderConfig) -> EncoderNames:
    """How the encoder's family names its tensors."""
    return _ENCODERS[config.model_type].names


def expected_tensors(config: AnyConfig) -> dict[str, Shape]:
    """Every tensor that a canonical folder must hold, tied ones once; [out, in] for projections."""
    if isinstance(config, EncoderConfig):
        return encoder_names(config).expected(config)
    return llama.expected_tensors(config)


def optional_tensors(config: AnyConfig) -> dict[str, Shape]:
    """What it may hold beside them: a bare encoder's pooler."""
    return encoder_names(config).optional_tensors(config) if isinstance(config, EncoderConfig) else {}


def tied_tensors(config: AnyConfig) -> dict[str, str]:
    """Names that need not be stored, and the tensor that each one is."""
    return {} if isinstance(config, EncoderConfig) else llama.tied_tensors(config)


def canonical_name(config: AnyConfig, name: str) -> str | None:
    """What a tensor of a Hugging Face folder is called in a canonical one; None: it is left out.

    Unknown names stay as they are: they are in neither `expected_tensors` nor `optional_tensors`.
    """
    return encoder_names(config).canonical(config, name) if isinstance(config, EncoderConfig) else name


def module_tree(config: AnyConfig) -> ModuleTree:
    """The modules of a model of any supported type, named as in transformers."""
    if isinstance(config, EncoderConfig):
        return encoder_names(config).tree(config)
    return llama.module_tree(config)
