"""One configuration for the whole Llama family, the decoders, read from a config.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from treadle.errors import FailedPrecondition
from treadle.models.config_values import (
    MAX_LAYERS,
    corrupt,
    flag,
    model_of,
    number,
    read_raw,
    size,
    unsupported,
)
from treadle.models.quantization_config import KEY, Quantization, read_quantization

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""The model types that this is the configuration of."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length that the model was first trained on.

    "default" leaves them; "linear" divides all by `factor`; "llama3" divides long wavelengths by
    `factor`, keeps short ones, and blends between `low_freq_factor` and `high_freq_factor`.
    """

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the mathematics of a decoder depends on. Lengths in tokens, sizes in elements."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases of the query, key and value projections."""
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMS norm over each head of queries and keys, before the rotation."""
    sliding_windows: tuple[int | None, ...] = field(default=())
    """One a layer: how many keys a token sees, itself included; None: all."""
    quantization: Quantization = ""
    """How the products' weights are stored."""

    def window(self, layer: int) -> int | None:
        """The layer's sliding window."""
        return self.sliding_windows[layer]


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a decoder's canonical folder; see `parse_config` for the errors."""
    return parse_config(read_raw(folder))


def parse_config(raw: object) -> ModelConfig:
    """A decoder's decoded config.json; `families.parse_any_config` takes every model's.

    Raises FailedPrecondition (UNSUPPORTED_ARCHITECTURE, UNSUPPORTED_QUANTIZATION, REMOTE_CODE) for what no
    code here computes, and InvalidArgument (CORRUPT_CONFIG) for values that cannot be.
    """
    model_type, raw = model_of(raw, DECODERS)
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise unsupported(f"hidden_act {activation!r:.80}; supported: silu")
    hidden, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    layers = size(raw, "num_hidden_layers", MAX_LAYERS)
    kv_heads = size(raw, "num_key_value_heads", default=heads)
    if raw.get("head_dim") is None and model_type != "qwen3" and hidden % heads:
        raise corrupt("hidden_size", f"must be a multiple of num_attention_heads ({heads}); got {hidden}")
    default_head_dim = 128 if model_type == "qwen3" else hidden // heads
    head_dim = size(raw, "head_dim", default=default_head_dim)
    if heads % kv_heads:
        raise corrupt("num_key_value_heads", f"must divide num_attention_heads ({heads}); got {kv_heads}")
    if head_dim % 2:
        raise corrupt("head_dim", f"must be even for rotary positions; got {head_dim}")
    max_positions = size(raw, "max_position_embeddings", default=2048)
    theta, scaling = _rope(raw, max_positions)
    biased = model_type in ("llama", "qwen3") and flag(raw, "attention_bias")
    config = ModelConfig(
        model_type=model_type,
        vocab_size=size(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(raw, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        attention_bias=model_type == "qwen2" or biased,
        output_bias=biased,
        mlp_bias=model_type == "llama" and flag(raw, "mlp_bias"),
        qk_norm=model_type == "qwen3",
        sliding_windows=_windows(raw, model_type, layers),
    )
    return replace(config, quantization=_quantization(raw, config))


def _quantization(raw: Mapping[str, Any], config: ModelConfig) -> Quantization:
    if not raw.get(KEY):
        return ""
    found = read_quantization(raw[KEY], config)
    if found is None:
        raise FailedPrecondition(
            "config.json says that the weights are quantised (quantization_config), and not by Treadle; "
            "import the float weights of this model, or its GGUF file",
            reason="UNSUPPORTED_QUANTIZATION",
        )
    return found


def _windows(raw: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    """One window a layer: Mistral has one for all; Qwen from `max_window_layers` on, if it uses it."""
    types = raw.get("layer_types")
    if types is not None and model_type in ("llama", "mistral"):
        raise unsupported(f"layer_types in a {model_type} model")
    if raw.get("sliding_window") is None or model_type == "llama":
        return (None,) * layers
    window = size(raw, "sliding_window")
    if model_type == "mistral":
        return (window,) * layers
    if not flag(raw, "use_sliding_window"):
        return (None,) * layers
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise corrupt("layer_types", f"must list {layers} layers")
        if unknown := [kind for kind in types if kind not in ("full_attention", "sliding_attention")]:
            raise unsupported(f"layer type {unknown[0]!r:.80}; supported: full_attention, sliding_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = size(raw, "max_window_layers", default=28, smallest=0)
    return tuple(window if layer >= first else None for layer in range(layers))


def _rope(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """Base and scaling; transformers 5 writes both into `rope_parameters`."""
    parameters = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or parameters
    if not isinstance(parameters, Mapping) or not isinstance(scaling, Mapping):
        raise corrupt("rope_scaling", "must be an object")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise unsupported("rotation for each kind of layer (nested rope parameters)")
    for holder in (raw, scaling):
        if holder.get("partial_rotary_factor") not in (None, 1):
            raise unsupported("rotation of a part of each head (partial_rotary_factor)")
    theta = number(parameters if parameters.get("rope_theta") is not None else raw, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", number(scaling, "factor"))
    if kind == "llama3":
        low, high = number(scaling, "low_freq_factor"), number(scaling, "high_freq_factor")
        if high <= low:
            raise corrupt(
                "rope_scaling.high_freq_factor", f"must be above low_freq_factor ({low}); got {high}"
            )
        original = size(scaling, "original_max_position_embeddings", default=max_positions)
        return theta, RopeScaling("llama3", number(scaling, "factor"), low, high, original)
    raise unsupported(f"rope type {kind!r:.80}; supported: default, linear, llama3")
