"""One configuration for the whole Llama family, read from a Hugging Face config.json. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle.models.quantization_config import KEY, Quantization, read_quantization

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_MAX_DIMENSION = 1 << 24
_MAX_LAYERS = 1024
MAX_CONFIG_BYTES = 1 << 20


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
    """The configuration of a canonical folder; see `parse_config` for the errors."""
    path = folder / "config.json"
    try:
        text = path.read_bytes()[: MAX_CONFIG_BYTES + 1]
    except OSError as error:
        raise InvalidArgument(
            f"{path.name} cannot be read: {error.strerror}", reason="CORRUPT_CONFIG"
        ) from error
    if len(text) > MAX_CONFIG_BYTES:
        raise InvalidArgument(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes", reason="CORRUPT_CONFIG")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path.name} is not JSON: {error}", reason="CORRUPT_CONFIG") from error
    return parse_config(raw)


def parse_config(raw: object) -> ModelConfig:
    """A decoded config.json as a ModelConfig.

    Raises FailedPrecondition (UNSUPPORTED_ARCHITECTURE, UNSUPPORTED_QUANTIZATION, REMOTE_CODE) for what no
    code here computes, and InvalidArgument (CORRUPT_CONFIG) for values that cannot be.
    """
    if not isinstance(raw, Mapping):
        raise _corrupt("config.json", "must be an object")
    if "auto_map" in raw:
        raise FailedPrecondition(
            "config.json asks for remote code (auto_map), which is never run; supported model types: "
            + ", ".join(MODEL_TYPES),
            reason="REMOTE_CODE",
        )
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise _unsupported(f"model_type {model_type!r:.80}; supported: {', '.join(MODEL_TYPES)}")
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise _unsupported(f"hidden_act {activation!r:.80}; supported: silu")
    hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    layers = _size(raw, "num_hidden_layers", _MAX_LAYERS)
    kv_heads = _size(raw, "num_key_value_heads", default=heads)
    if raw.get("head_dim") is None and model_type != "qwen3" and hidden % heads:
        raise _corrupt("hidden_size", f"must be a multiple of num_attention_heads ({heads}); got {hidden}")
    default_head_dim = 128 if model_type == "qwen3" else hidden // heads
    head_dim = _size(raw, "head_dim", default=default_head_dim)
    if heads % kv_heads:
        raise _corrupt("num_key_value_heads", f"must divide num_attention_heads ({heads}); got {kv_heads}")
    if head_dim % 2:
        raise _corrupt("head_dim", f"must be even for rotary positions; got {head_dim}")
    max_positions = _size(raw, "max_position_embeddings", default=2048)
    theta, scaling = _rope(raw, max_positions)
    biased = model_type in ("llama", "qwen3") and _flag(raw, "attention_bias")
    config = ModelConfig(
        model_type=model_type,
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(raw, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        attention_bias=model_type == "qwen2" or biased,
        output_bias=biased,
        mlp_bias=model_type == "llama" and _flag(raw, "mlp_bias"),
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
        raise _unsupported(f"layer_types in a {model_type} model")
    if raw.get("sliding_window") is None or model_type == "llama":
        return (None,) * layers
    window = _size(raw, "sliding_window")
    if model_type == "mistral":
        return (window,) * layers
    if not _flag(raw, "use_sliding_window"):
        return (None,) * layers
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise _corrupt("layer_types", f"must list {layers} layers")
        if unknown := [kind for kind in types if kind not in ("full_attention", "sliding_attention")]:
            raise _unsupported(f"layer type {unknown[0]!r:.80}; supported: full_attention, sliding_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = _size(raw, "max_window_layers", default=28, smallest=0)
    return tuple(window if layer >= first else None for layer in range(layers))


def _rope(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """Base and scaling; transformers 5 writes both into `rope_parameters`."""
    parameters = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or parameters
    if not isinstance(parameters, Mapping) or not isinstance(scaling, Mapping):
        raise _corrupt("rope_scaling", "must be an object")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise _unsupported("rotation for each kind of layer (nested rope parameters)")
    for holder in (raw, scaling):
        if holder.get("partial_rotary_factor") not in (None, 1):
            raise _unsupported("rotation of a part of each head (partial_rotary_factor)")
    theta = _number(parameters if parameters.get("rope_theta") is not None else raw, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", _number(scaling, "factor"))
    if kind == "llama3":
        low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
        if high <= low:
            raise _corrupt(
                "rope_scaling.high_freq_factor", f"must be above low_freq_factor ({low}); got {high}"
            )
        original = _size(scaling, "original_max_position_embeddings", default=max_positions)
        return theta, RopeScaling("llama3", _number(scaling, "factor"), low, high, original)
    raise _unsupported(f"rope type {kind!r:.80}; supported: default, linear, llama3")


def _size(
    raw: Mapping[str, Any],
    name: str,
    largest: int = _MAX_DIMENSION,
    default: int | None = None,
    smallest: int = 1,
) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise _corrupt(name, f"must be a whole number from {smallest} to {largest}; got {value!r:.80}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise _corrupt(name, f"must be a number above 0; got {value!r:.80}")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise _corrupt(name, f"must be true or false; got {value!r:.80}")
    return bool(value)


def _corrupt(name: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"config.json: {name} {problem}", reason="CORRUPT_CONFIG")


def _unsupported(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"unsupported {what}", reason="UNSUPPORTED_ARCHITECTURE")
