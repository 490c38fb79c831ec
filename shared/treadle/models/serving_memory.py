"""What an engine takes: keys and values by the block, and the tensors of a step. No torch.

The worker makes its cache by these figures, and the planner counts with them before there is a worker.
"""

from __future__ import annotations

from collections.abc import Mapping

from treadle.models.config import ModelConfig
from treadle.models.encoder_config import EncoderConfig

DEFAULT_BLOCK_SIZE = 32
"""Tokens a block of keys and values."""
DEFAULT_BATCHED_TOKENS = 256
"""Tokens of a step at most."""
DEFAULT_ENCODER_TOKENS = 2048
"""Tokens of an encoder's step at most; a longer text is a step of its own."""

_CACHE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
CACHE_DTYPES = tuple(_CACHE_BYTES)
_SCALE_BYTES = 4
"""An int8 cache has a float32 scale for each token and head."""
_FLOAT32 = 4
_LOGIT_TENSORS = 2
"""Of a sampled row: logits, and what is made of them."""


def cache_block_bytes(config: ModelConfig, block_size: int, cache_dtype: str) -> int:
    """Bytes of a block of so many tokens: all layers, keys and values, scales included.

    `cache_dtype` is one of CACHE_DTYPES; raises KeyError for others.
    """
    scale = _SCALE_BYTES if cache_dtype == "int8" else 0
    head = config.head_dim * _CACHE_BYTES[cache_dtype] + scale
    return 2 * config.num_hidden_layers * config.num_key_value_heads * block_size * head


def cache_bytes(
    config: ModelConfig, context: int, batch: int, cache_dtype: str, block_size: int = DEFAULT_BLOCK_SIZE
) -> int:
    """Bytes of the blocks of `batch` sequences of `context` tokens; a sequence's last block is whole."""
    return batch * -(-context // block_size) * cache_block_bytes(config, block_size, cache_dtype)


def step_bytes(
    config: ModelConfig, context: int, batch: int, most_tokens: int = DEFAULT_BATCHED_TOKENS
) -> int:
    """Bytes of the tensors that live at once in the largest step of `batch` sequences.

    The stream between layers is float32, as the engine's own kernels keep it. Beside it lives what the
    widest part of a layer needs: queries, keys, values and what attention gave, or gates, their activation,
    values and the product; and at the end, of each sequence's last row, the logits.
    """
    tokens = min(batch * context, max(batch, most_tokens))
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    widest = max(heads + 2 * keys + heads, 4 * config.intermediate_size)
    layer = tokens * (2 * config.hidden_size + widest)
    return _FLOAT32 * (layer + _LOGIT_TENSORS * batch * config.vocab_size)


def encoder_step_bytes(
    config: EncoderConfig, context: int, batch: int, most_tokens: int = DEFAULT_ENCODER_TOKENS
) -> int:
    """Bytes of the tensors that live at once in the largest step over `batch` texts of `context` tokens.

    The stream, and the widest part of a layer beside it: queries, keys, values and what attention gave, which
    is there twice while it is put in order, or what is between the two products of the feed-forward, before
    and after its activation.
    """
    tokens = max(context, min(batch * context, most_tokens))
    widest = max(5 * config.hidden_size, 2 * config.intermediate_size)
    return _FLOAT32 * tokens * (2 * config.hidden_size + widest)
