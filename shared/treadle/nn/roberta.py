"""RoBERTa (Liu et al., 2019): what it does not share with the other encoders.

T: tokens of all texts, one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.models.encoder_config import EncoderConfig
from treadle.nn.encoder_layers import SequenceHead


def sequence_head(config: EncoderConfig) -> SequenceHead:
    """A classifier of two layers."""
    return SequenceHead(config, torch.tanh)


def positions(token_ids_T: Tensor, starts_T: Tensor, config: EncoderConfig) -> Tensor:
    """Rows of the position table, from behind the padding token's on.

    A padding token that stands in a text has the padding's own row and is not counted, as in transformers.
    """
    is_token_T = (token_ids_T != config.pad_token_id).long()
    # How many there were up to each token, and before its text.
    upto_T = is_token_T.cumsum(0)
    before_T = (upto_T - is_token_T)[starts_T]
    return (upto_T - before_T) * is_token_T + config.pad_token_id
