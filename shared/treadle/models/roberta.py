"""RoBERTa (Liu et al., 2019) and XLM-RoBERTa (Conneau et al., 2019): configuration and names. No torch.

The two differ in vocabulary, and in what transformers calls their classes. The layers are BERT's. Positions
are counted from behind the padding token's id, and a text's classifier has a layer of its own in the pooler's
place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from treadle.models.bert import LAYER
from treadle.models.config_values import corrupt, size
from treadle.models.encoder_config import EncoderConfig, parse_encoder
from treadle.models.encoder_tensors import EncoderNames, to_hidden, to_labels

NAMES = EncoderNames(
    class_name="Roberta",
    prefix="roberta",
    layers="encoder.layer",
    layer=LAYER,
    layer_class="RobertaLayer",
    heads={
        "": {},
        "sequence": {"classifier.dense": to_hidden, "classifier.out_proj": to_labels},
        "token": {"classifier": to_labels},
    },
    optional=("pooler.dense",),
    dropped=("lm_head.",),
)
XLM_NAMES = replace(NAMES, class_name="XLMRoberta", layer_class="XLMRobertaLayer")


def parse(raw: Mapping[str, Any]) -> EncoderConfig:
    """See `parse_encoder`."""
    return _parse(raw, "roberta", NAMES)


def parse_xlm(raw: Mapping[str, Any]) -> EncoderConfig:
    """See `parse_encoder`."""
    return _parse(raw, "xlm-roberta", XLM_NAMES)


def _parse(raw: Mapping[str, Any], model_type: str, names: EncoderNames) -> EncoderConfig:
    padding = size(raw, "pad_token_id", default=1, smallest=0)
    config = parse_encoder({**raw, "pad_token_id": padding}, model_type, names.class_name)
    if config.max_position_embeddings <= padding + 1:
        raise corrupt(
            "max_position_embeddings",
            f"must be above pad_token_id + 1 ({padding + 1}); got {config.max_position_embeddings}",
        )
    return replace(config, first_position=padding + 1)
