"""DistilBERT (Sanh et al., 2019): what it does not share with the other encoders. Positions are BERT's."""

from __future__ import annotations

import torch

from treadle.models.encoder_config import EncoderConfig
from treadle.nn.encoder_layers import SequenceHead


def sequence_head(config: EncoderConfig) -> SequenceHead:
    """A layer with ReLU, and the classifier on it."""
    return SequenceHead(config, torch.relu)
