"""Tensor names and shapes of the Llama family, as Hugging Face folders have them. No torch.

`expected_tensors` is what a canonical folder holds; the registry checks what it writes against it and the
loader what it reads.
"""

from __future__ import annotations

from treadle.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

NO_SPLIT_MODULE = "model.layers.{layer}"
"""A unit that a device map never divides."""

Shape = tuple[int, ...]


def tied_tensors(config: ModelConfig) -> dict[str, str]:
    """Names that need not be stored, and the tensor that each one is."""
    return {HEAD: EMBEDDING} if config.tie_word_embeddings else {}


def layer_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Names below `model.layers.<n>.` with their shapes, [out, in] for projections."""
    hidden, head_dim, inner = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    tensors: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        tensors |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
        }
    if config.output_bias:
        tensors["self_attn.o_proj.bias"] = (hidden,)
    if config.mlp_bias:
        tensors |= {
            "mlp.gate_proj.bias": (inner,),
            "mlp.up_proj.bias": (inner,),
            "mlp.down_proj.bias": (hidden,),
        }
    if config.qk_norm:
        tensors |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    return tensors


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that must be stored, tied ones once."""
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_tensors(config).items()}
    tensors["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, config.hidden_size)
    return tensors
