"""What the encoders are made of: embeddings, layers with the norm behind, and heads.

Module names are our own; `nn.encoder_weights` says which tensors each one gets.

T: tokens of all texts, one after another; N: texts; E: hidden size; X: three times that; L: labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.models.encoder_config import EncoderConfig
from treadle.nn.activations import ACTIVATIONS
from treadle.nn.encoder_attention import TextAttention
from treadle.nn.linear import Linear
from treadle.nn.llama import Embedding


class LayerNorm(nn.Module):
    """Layer norm over the last dimension (Ba et al., 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., size]; the same dtype comes out."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class EncoderEmbeddings(nn.Module):
    """Words, positions and, where the model has them, the texts of a pair: added up and normed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, kinds = config.hidden_size, config.type_vocab_size
        self.words = Embedding(config.vocab_size, hidden)
        self.positions = Embedding(config.max_position_embeddings, hidden)
        self.types = Embedding(kinds, hidden) if kinds else None
        self.norm = LayerNorm(hidden, config.layer_norm_eps)

    def forward(self, token_ids_T: Tensor, type_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """[T, E], in the norm's dtype."""
        hidden_TE: Tensor = self.words(token_ids_T).to(self.norm.weight.dtype)
        if self.types is not None:
            hidden_TE = hidden_TE + self.types(type_ids_T)
        normed_TE: Tensor = self.norm(hidden_TE + self.positions(positions_T))
        return normed_TE


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each added to the stream and normed after it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.activation = ACTIVATIONS[config.activation]
        self.qkv = Linear(hidden, 3 * hidden, bias=True)
        self.attention_output = Linear(hidden, hidden, bias=True)
        self.attention_norm = LayerNorm(hidden, eps)
        self.intermediate = Linear(hidden, inner, bias=True)
        self.output = Linear(inner, hidden, bias=True)
        self.output_norm = LayerNorm(hidden, eps)

    def forward(self, hidden_TE: Tensor, attend: TextAttention) -> Tensor:
        """[T, E] to [T, E]; may write over what it was given."""
        mixed_TE = attend(self.qkv(hidden_TE))
        hidden_TE = self.attention_norm(self.attention_output(mixed_TE, residual=hidden_TE))
        inner_TI = self.activation(self.intermediate(hidden_TE))
        out: Tensor = self.output_norm(self.output(inner_TI, residual=hidden_TE))
        return out


class SequenceHead(nn.Module):
    """A layer over a text's first token, its activation, and the classifier on it."""

    def __init__(self, config: EncoderConfig, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.out = Linear(config.hidden_size, config.num_labels, bias=True)

    def forward(self, first_NE: Tensor) -> Tensor:
        """Each text's first vector [N, E] to [N, L]."""
        logits: Tensor = self.out(self.activation(self.dense(first_NE)))
        return logits


class TokenHead(nn.Module):
    """Labels of each token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.out = Linear(config.hidden_size, config.num_labels, bias=True)

    def forward(self, hidden_TE: Tensor) -> Tensor:
        """[T, E] to [T, L]."""
        logits: Tensor = self.out(hidden_TE)
        return logits
