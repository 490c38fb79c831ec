"""DistilBERT (Sanh et al., 2019): its configuration and the names of its tensors. No torch.

BERT's layers under other names; no token types, no pooler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.models.config_values import MAX_LAYERS, size
from treadle.models.encoder_config import (
    EncoderConfig,
    activation_of,
    check_plain,
    head_of,
    heads_of,
    labels_of,
)
from treadle.models.encoder_tensors import EncoderNames, LayerNames, to_hidden, to_labels

NAMES = EncoderNames(
    class_name="DistilBert",
    prefix="distilbert",
    layers="transformer.layer",
    layer=LayerNames(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        intermediate="ffn.lin1",
        output="ffn.lin2",
        output_norm="output_layer_norm",
    ),
    layer_class="TransformerBlock",
    heads={
        "": {},
        "sequence": {"pre_classifier": to_hidden, "classifier": to_labels},
        "token": {"classifier": to_labels},
    },
    optional=(),
    dropped=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)

_EPSILON = 1e-12
"""No setting in transformers."""


def parse(raw: Mapping[str, Any]) -> EncoderConfig:
    """The errors are those of `parse_encoder`."""
    check_plain(raw)
    head = head_of(raw, "DistilBert")
    return EncoderConfig(
        model_type="distilbert",
        head=head,
        num_labels=labels_of(raw) if head else 0,
        vocab_size=size(raw, "vocab_size"),
        hidden_size=size(raw, "dim"),
        intermediate_size=size(raw, "hidden_dim"),
        num_hidden_layers=size(raw, "n_layers", MAX_LAYERS),
        num_attention_heads=heads_of(raw, "dim", "n_heads"),
        max_position_embeddings=size(raw, "max_position_embeddings", default=512),
        type_vocab_size=0,
        layer_norm_eps=_EPSILON,
        pad_token_id=size(raw, "pad_token_id", default=0, smallest=0),
        activation=activation_of(raw, "activation"),
    )
