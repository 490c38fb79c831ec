"""BERT (Devlin et al., 2018): its configuration and the names of its tensors. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.models.encoder_config import EncoderConfig, parse_encoder
from treadle.models.encoder_tensors import EncoderNames, LayerNames, to_hidden, to_labels

LAYER = LayerNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    intermediate="intermediate.dense",
    output="output.dense",
    output_norm="output.LayerNorm",
)

NAMES = EncoderNames(
    class_name="Bert",
    prefix="bert",
    layers="encoder.layer",
    layer=LAYER,
    layer_class="BertLayer",
    heads={
        "": {},
        "sequence": {"pooler.dense": to_hidden, "classifier": to_labels},
        "token": {"classifier": to_labels},
    },
    optional=("pooler.dense",),
    dropped=("cls.",),
)


def parse(raw: Mapping[str, Any]) -> EncoderConfig:
    """See `parse_encoder`."""
    return parse_encoder(raw, "bert", "Bert")
