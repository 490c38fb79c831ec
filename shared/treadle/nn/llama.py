"""The Llama family: SmolLM2, Llama 2 and 3, Mistral, Qwen2, Qwen3.

One file from the top down: model, layer, attention, feed-forward. What tells the members apart is in
`ModelConfig`: biases, query and key norms, windows, rope scaling. Modules are named as Hugging Face
folders name their tensors, but for those that are multiplied at once: see MERGED.

Every product takes its norm or gate before it and its residual after it, so that a kernel may do all of
them in one pass.

T: tokens of a step; E: hidden size; H: query heads; K: key heads; D: size of a head; X: a product's
outputs; V: vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.models.config import ModelConfig
from treadle.nn.attention import Attention
from treadle.nn.linear import Linear, RMSNorm

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections whose outputs stand side by side in one product."""


class LlamaForCausalLM(nn.Module):
    """A decoder and its language model head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def is_native(self) -> bool:
        """Whether its products are the native kernels'."""
        return self.model.float32_stream

    def forward(self, token_ids_T: Tensor, attend: Attention) -> Tensor:
        """Hidden states [T, E] before the last norm."""
        hidden: Tensor = self.model(token_ids_T, attend)
        return hidden

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Float32 logits [T, V] of what `forward` gave; call it with the rows that are needed."""
        logits: Tensor = self.lm_head(hidden_TE, norm=self.model.norm)
        return logits.float()


class LlamaModel(nn.Module):
    """Embedding and layers, and the last norm, which is taken with the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.float32_stream = False
        """Whether what goes from layer to layer is float32, whatever the weights are."""

    def forward(self, token_ids_T: Tensor, attend: Attention) -> Tensor:
        """Hidden states [T, E] before the last norm."""
        hidden_TE: Tensor = self.embed_tokens(token_ids_T)
        if self.float32_stream:
            hidden_TE = hidden_TE.float()
        for layer in self.layers:
            hidden_TE = layer(hidden_TE, attend)
        return hidden_TE


class Embedding(nn.Module):
    """A row for each token. torch's own is given random rows first, and on the meta device that brings in 820
    modules, 75 MB."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """[T] to [T, E]."""
        return F.embedding(token_ids_T, self.weight)


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_TE: Tensor, attend: Attention) -> Tensor:
        """[T, E] to [T, E]."""
        attention, mlp = self.self_attn, self.mlp
        qkv_TX = attention.qkv_proj(hidden_TE, norm=self.input_layernorm)
        mixed_TX = attend(self.layer, qkv_TX, attention.q_norm, attention.k_norm)
        hidden_TE = attention.o_proj(mixed_TX, residual=hidden_TE)
        gate_up_TX = mlp.gate_up_proj(hidden_TE, norm=self.post_attention_layernorm)
        out: Tensor = mlp.down_proj(gate_up_TX, gated=True, residual=hidden_TE)
        return out


class LlamaAttention(nn.Module):
    """Projections, and norms of queries and keys; rotation and attention are the caller's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, queries + 2 * keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None


class LlamaMLP(nn.Module):
    """Gated feed-forward with SiLU (Shazeer, 2020): gates and values are one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)


def build(config: ModelConfig) -> LlamaForCausalLM:
    """A model without weights, on the meta device: the loader assigns them."""
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()
