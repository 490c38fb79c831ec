"""An encoder and its head over a flat batch, for every architecture: the table of them is here.

The stream is float32 on the CPU and the weights' dtype on an accelerator.

T: tokens of all texts, one after another; N: texts; E: hidden size; L: labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treadle.models.encoder_config import EncoderConfig
from treadle.nn import bert, distilbert, roberta
from treadle.nn.encoder_attention import TextAttention, TorchTextAttention
from treadle.nn.encoder_layers import EncoderEmbeddings, EncoderLayer, TokenHead
from treadle.nn.native import NativeTextAttention


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """Texts one after another, without padding; `lengths` sum up to T. Ids are int64."""

    token_ids_T: Tensor
    type_ids_T: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture has of its own."""

    sequence_head: Callable[[EncoderConfig], nn.Module]
    positions: Callable[[Tensor, Tensor, EncoderConfig], Tensor]


ENCODERS: Mapping[str, Architecture] = {
    "bert": Architecture(bert.sequence_head, bert.positions),
    "roberta": Architecture(roberta.sequence_head, roberta.positions),
    "xlm-roberta": Architecture(roberta.sequence_head, roberta.positions),
    "distilbert": Architecture(distilbert.sequence_head, bert.positions),
}
"""The encoders by `model_type`: a new one adds a row here."""


class EncoderModel(nn.Module):
    """Embeddings, layers and the head that the configuration names."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        architecture = ENCODERS[config.model_type]
        self._positions = architecture.positions
        self.embeddings = EncoderEmbeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.head: nn.Module | None = None
        if config.head == "sequence":
            self.head = architecture.sequence_head(config)
        elif config.head == "token":
            self.head = TokenHead(config)
        self.is_native = False
        """Whether its products are the native kernels'."""

    @torch.inference_mode()
    def forward(self, batch: EncoderBatch) -> Tensor:
        """The last hidden states, float32 [T, E]; no text may be longer than `config.max_input_tokens`."""
        device = batch.token_ids_T.device
        lengths_N = torch.tensor(batch.lengths)
        starts_T = (lengths_N.cumsum(0) - lengths_N).repeat_interleave(lengths_N).to(device)
        positions_T = self._positions(batch.token_ids_T, starts_T, self.config)
        attend = self._attention(batch.lengths, device)
        hidden_TE: Tensor = self.embeddings(batch.token_ids_T, batch.type_ids_T, positions_T)
        for layer in self.layers:
            hidden_TE = layer(hidden_TE, attend)
        return hidden_TE.float()

    def _attention(self, lengths: tuple[int, ...], device: torch.device) -> TextAttention:
        if self.is_native and self.config.head_dim % 16 == 0:
            return NativeTextAttention(lengths, self.config.num_attention_heads)
        return TorchTextAttention(lengths, self.config.num_attention_heads, device)

    @torch.inference_mode()
    def sequence_logits(self, hidden_TE: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Float32 logits of each text [N, L], of what `forward` gave; the head is a sequence classifier's."""
        assert self.head is not None
        assert self.config.head == "sequence"
        lengths_N = torch.tensor(lengths, device=hidden_TE.device)
        first_NE = hidden_TE[lengths_N.cumsum(0) - lengths_N]
        logits: Tensor = self.head(first_NE).float()
        return logits

    @torch.inference_mode()
    def token_logits(self, hidden_TE: Tensor) -> Tensor:
        """Float32 logits of each token [T, L], of what `forward` gave; the head is a token classifier's."""
        assert self.head is not None
        assert self.config.head == "token"
        logits: Tensor = self.head(hidden_TE).float()
        return logits


def build(config: EncoderConfig) -> EncoderModel:
    """A model without weights, on the meta device: the loader assigns them."""
    with torch.device("meta"):
        return EncoderModel(config).eval()
