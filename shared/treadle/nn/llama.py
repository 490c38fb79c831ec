"""The Llama family: SmolLM2, Llama 2 and 3, Mistral, Qwen2, Qwen3.

One file from the top down: model, layer, attention, feed-forward. What tells the members apart is in
`ModelConfig`: biases, query and key norms, windows, rope scaling. Modules are named as Hugging Face
folders name their tensors.

T: tokens of a step; E: hidden size; H: query heads; K: key heads; D: size of a head; V: vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treadle.models.config import ModelConfig
from treadle.nn.attention import Attention
from treadle.nn.linear import Linear, RMSNorm, silu
from treadle.nn.rope import RotaryEmbedding, rotate


class LlamaForCausalLM(nn.Module):
    """A decoder and its language model head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: Attention) -> Tensor:
        """Hidden states [T, E], after the last norm."""
        hidden: Tensor = self.model(token_ids_T, positions_T, attend)
        return hidden

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Float32 logits [T, V]; call it with the rows that are needed."""
        logits: Tensor = self.lm_head(hidden_TE)
        return logits.float()


class LlamaModel(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _freeze=True)
        self.layers = nn.ModuleList(LlamaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rotary: RotaryEmbedding | None = None

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: Attention) -> Tensor:
        """Hidden states [T, E]."""
        if self._rotary is None:
            self._rotary = RotaryEmbedding(self.config, token_ids_T.device)
        cos, sin = self._rotary.at(positions_T)
        hidden_TE: Tensor = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            hidden_TE = layer(hidden_TE, cos, sin, attend)
        normed: Tensor = self.norm(hidden_TE)
        return normed


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_TE: Tensor, cos: Tensor, sin: Tensor, attend: Attention) -> Tensor:
        """[T, E] to [T, E]."""
        hidden_TE = hidden_TE + self.self_attn(self.input_layernorm(hidden_TE), cos, sin, attend)
        added: Tensor = hidden_TE + self.mlp(self.post_attention_layernorm(hidden_TE))
        return added


class LlamaAttention(nn.Module):
    """Projections, norms of queries and keys, rotation; the attention itself is the caller's."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_TE: Tensor, cos: Tensor, sin: Tensor, attend: Attention) -> Tensor:
        """[T, E] to [T, E]."""
        q_THD = self.q_proj(x_TE).unflatten(-1, (-1, self.head_dim))
        k_TKD = self.k_proj(x_TE).unflatten(-1, (-1, self.head_dim))
        v_TKD = self.v_proj(x_TE).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        o_THD = attend(self.layer, rotate(q_THD, cos, sin), rotate(k_TKD, cos, sin), v_TKD)
        out: Tensor = self.o_proj(o_THD.flatten(1))
        return out


class LlamaMLP(nn.Module):
    """Gated feed-forward with SiLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x_TE: Tensor) -> Tensor:
        """[T, E] to [T, E]."""
        out: Tensor = self.down_proj(silu(self.gate_proj(x_TE)) * self.up_proj(x_TE))
        return out


def build(config: ModelConfig) -> LlamaForCausalLM:
    """A model without weights, on the meta device: the loader assigns them."""
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()
