"""One configuration for the encoders (BERT and its kin), read from a Hugging Face config.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from treadle.errors import FailedPrecondition
from treadle.models.config_values import MAX_LAYERS, corrupt, flag, number, size, unsupported
from treadle.models.quantization_config import KEY

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Head = Literal["", "sequence", "token"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""By the names that transformers has for them; three are the same formula."""
_HEADS: Mapping[str, Head] = {
    "Model": "",
    "ForMaskedLM": "",
    "ForPreTraining": "",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}
"""By what the class is called behind the architecture's name."""
_MAX_LABELS = 1 << 16


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What the mathematics of an encoder depends on. Lengths in tokens, sizes in elements."""

    model_type: str
    head: Head
    """What stands on the encoder: nothing, or a classifier of whole texts or of tokens."""
    num_labels: int
    """Outputs of the head; 0 without one."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    """Rows of the position table, as config.json has it; see `max_input_tokens`."""
    type_vocab_size: int
    """Kinds of tokens: the texts of a pair; 0: the model has no embedding of them."""
    layer_norm_eps: float
    pad_token_id: int
    activation: Activation
    first_position: int = 0
    """The row of the position table that a text's first token gets."""
    quantization: Literal[""] = ""
    """How the products' weights are stored: as floats."""

    @property
    def max_input_tokens(self) -> int:
        """The longest text, special tokens included."""
        return self.max_position_embeddings - self.first_position

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads


def parse_encoder(raw: Mapping[str, Any], model_type: str, class_name: str) -> EncoderConfig:
    """What BERT and RoBERTa say in the same words; `class_name` begins the names of their classes.

    Raises FailedPrecondition (UNSUPPORTED_ARCHITECTURE, UNSUPPORTED_QUANTIZATION) for what no code here
    computes, and InvalidArgument (CORRUPT_CONFIG) for values that cannot be.
    """
    check_plain(raw)
    for switch in ("is_decoder", "add_cross_attention"):
        if flag(raw, switch):
            raise unsupported(f"{switch} in a {model_type} model: encoders see the whole text")
    if (kind := raw.get("position_embedding_type", "absolute")) not in (None, "absolute"):
        raise unsupported(f"position_embedding_type {kind!r:.80}; supported: absolute")
    head = head_of(raw, class_name)
    return EncoderConfig(
        model_type=model_type,
        head=head,
        num_labels=labels_of(raw) if head else 0,
        vocab_size=size(raw, "vocab_size"),
        hidden_size=size(raw, "hidden_size"),
        intermediate_size=size(raw, "intermediate_size"),
        num_hidden_layers=size(raw, "num_hidden_layers", MAX_LAYERS),
        num_attention_heads=heads_of(raw, "hidden_size", "num_attention_heads"),
        max_position_embeddings=size(raw, "max_position_embeddings", default=512),
        type_vocab_size=size(raw, "type_vocab_size", default=2),
        layer_norm_eps=number(raw, "layer_norm_eps", 1e-12),
        pad_token_id=size(raw, "pad_token_id", default=0, smallest=0),
        activation=activation_of(raw, "hidden_act"),
    )


def check_plain(raw: Mapping[str, Any]) -> None:
    """Raises FailedPrecondition where weights are quantised or heads were cut away."""
    if raw.get(KEY):
        raise FailedPrecondition(
            "config.json says that the weights are quantised (quantization_config); encoders are quantised "
            "as they are loaded (TREADLE_ENGINE_QUANTIZATION=int8): import the float weights of this model",
            reason="UNSUPPORTED_QUANTIZATION",
        )
    if raw.get("pruned_heads"):
        raise unsupported("pruned_heads: every layer must have all its heads")


def head_of(raw: Mapping[str, Any], class_name: str) -> Head:
    """The head that `architectures` names; none where it is left out. A language model's is not kept."""
    named = raw.get("architectures") or [f"{class_name}Model"]
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise corrupt("architectures", f"must be a list of names; got {named!r:.80}")
    suffix = named[0].removeprefix(class_name)
    if not named[0].startswith(class_name) or suffix not in _HEADS:
        supported = ", ".join(f"{class_name}{each}" for each in _HEADS)
        raise unsupported(f"architecture {named[0]!r:.80}; supported: {supported}")
    return _HEADS[suffix]


def labels_of(raw: Mapping[str, Any]) -> int:
    """How many outputs the head has: as `id2label` has entries, or `num_labels` says; else two."""
    names = raw.get("id2label")
    if names is None:
        return size(raw, "num_labels", _MAX_LABELS, default=2)
    if not isinstance(names, Mapping) or not 1 <= len(names) <= _MAX_LABELS:
        raise corrupt("id2label", f"must be an object of 1 to {_MAX_LABELS} labels")
    if raw.get("num_labels") is not None and size(raw, "num_labels", _MAX_LABELS) != len(names):
        raise corrupt("num_labels", f"must be what id2label has, {len(names)}; got {raw['num_labels']}")
    if {str(key) for key in names} != {str(index) for index in range(len(names))}:
        raise corrupt("id2label", f"must name the outputs 0 to {len(names) - 1}, each once")
    return len(names)


def heads_of(raw: Mapping[str, Any], hidden_name: str, heads_name: str) -> int:
    """The number of heads, which divides the hidden size."""
    hidden, heads = size(raw, hidden_name), size(raw, heads_name)
    if hidden % heads:
        raise corrupt(hidden_name, f"must be a multiple of {heads_name} ({heads}); got {hidden}")
    return heads


def activation_of(raw: Mapping[str, Any], name: str) -> Activation:
    """The feed-forward's function."""
    asked = raw.get(name, "gelu")
    if not isinstance(asked, str) or asked not in _ACTIVATIONS:
        raise unsupported(f"{name} {asked!r:.80}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[asked]
