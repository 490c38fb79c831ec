"""What a training step takes beside the weights: moments, and what the backward pass needs. No torch."""

from __future__ import annotations

from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import AnyConfig
from treadle.models.module_tree import ModuleTensor, ModuleTree

_FLOAT32 = 4
_MOMENTS = 2


def lora_parameters(tree: ModuleTree, rank: int) -> int:
    """Of adapters of that rank on every linear layer of the blocks: rank x (inputs + outputs) each.

    Hu et al., "LoRA" (2021), section 4.1; on all linear layers as in Dettmers et al., "QLoRA" (2023).
    """
    return sum(rank * sum(tensor.shape) for tensor in linear_weights(tree))


def linear_weights(tree: ModuleTree) -> list[ModuleTensor]:
    """The weights [out, in] of the linear layers within blocks."""
    return [tensor for tensor in tree.parameters() if tensor.is_quantizable]


def moment_bytes(parameters: int) -> int:
    """Adam's two moments, in float32 (Kingma and Ba, 2015; Rajbhandari et al., "ZeRO", 2020, section 3.1)."""
    return _MOMENTS * _FLOAT32 * parameters


def master_bytes(parameters: int, dtype_bytes: int) -> int:
    """The float32 weights that the optimiser steps on where the model's are narrower (ZeRO, section 3.1)."""
    return _FLOAT32 * parameters if dtype_bytes < _FLOAT32 else 0


def saved_bytes(config: AnyConfig, tokens: int, dtype_bytes: int, *, checkpointing: bool) -> int:
    """Bytes that the forward pass of `tokens` tokens keeps for the backward pass, at their most.

    Counted as Korthikanti et al. do ("Reducing Activation Recomputation in Large Transformer Models", 2022,
    section 4), for layers without dropout, and for attention that keeps its inputs, its result and a
    number a row, and not the square of the scores (Dao et al., "FlashAttention", 2022). With
    `checkpointing` each layer keeps its input alone, and one layer at a time has the rest again.
    """
    layers = config.num_hidden_layers
    inputs = tokens * config.hidden_size * dtype_bytes
    layer = _layer_bytes(config, tokens, dtype_bytes)
    # Behind its last layer a decoder has a norm, and an encoder has one behind its embeddings.
    head = _norm_bytes(config, tokens, dtype_bytes) + _loss_bytes(config, tokens, dtype_bytes)
    if checkpointing:
        return layers * inputs + max(layer, head)
    return layers * layer + head


def _layer_bytes(config: AnyConfig, tokens: int, dtype_bytes: int) -> int:
    heads = config.num_attention_heads * config.head_dim
    if isinstance(config, EncoderConfig):
        # Queries, keys, values and result; what the activation was given, and its own result.
        kept = 4 * heads + 2 * config.intermediate_size
        rows = tokens * config.num_attention_heads * _FLOAT32
        return tokens * kept * dtype_bytes + rows + 2 * _norm_bytes(config, tokens, dtype_bytes)
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * heads + 2 * keys  # queries and result; keys and values
    if config.qk_norm:
        attention += 2 * (heads + keys)
    gated = 4 * config.intermediate_size  # gates, their activation, values, and the product
    rows = tokens * config.num_attention_heads * _FLOAT32
    return tokens * (attention + gated) * dtype_bytes + rows + 2 * _norm_bytes(config, tokens, dtype_bytes)


def _norm_bytes(config: AnyConfig, tokens: int, dtype_bytes: int) -> int:
    """Computed in float32: its input there, what is scaled, and the result that a product keeps."""
    return tokens * config.hidden_size * (_FLOAT32 + 2 * dtype_bytes)


def _loss_bytes(config: AnyConfig, tokens: int, dtype_bytes: int) -> int:
    """Logits, the same in float32 where they are narrower, log-probabilities, and their gradient.

    Of an encoder without a head there are none: what it is trained for compares texts.
    """
    wide = _FLOAT32 if dtype_bytes < _FLOAT32 else 0
    outputs = config.num_labels if isinstance(config, EncoderConfig) else config.vocab_size
    return tokens * outputs * (dtype_bytes + wide + 2 * _FLOAT32)
