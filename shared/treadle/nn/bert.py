"""BERT (Devlin et al., 2018): what it does not share with the other encoders.

T: tokens of all texts, one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.models.encoder_config import EncoderConfig
from treadle.nn.encoder_layers import SequenceHead


def sequence_head(config: EncoderConfig) -> SequenceHead:
    """The pooler, and the classifier on it."""
    return SequenceHead(config, torch.tanh)


def positions(token_ids_T: Tensor, starts_T: Tensor, config: EncoderConfig) -> Tensor:
    """Rows of the position table: a text's tokens from 0 on. `starts_T` is where each token's text begins."""
    return torch.arange(len(token_ids_T), device=token_ids_T.device) - starts_T
