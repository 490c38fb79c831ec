"""How much memory a model takes, before anything of it is loaded. No torch.

One estimator for the registry's answer, the worker's admission and the trainer's check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from treadle.errors import InvalidArgument, invalid_field
from treadle.models.element_sizes import DTYPE_BYTES
from treadle.models.encoder_config import EncoderConfig
from treadle.models.encoder_tensors import QUANTIZED_GROUP
from treadle.models.families import AnyConfig, encoder_names, module_tree
from treadle.models.module_tree import ModuleTree
from treadle.models.quantized_weights import QUANTIZATIONS, quantized_bytes
from treadle.models.serving_memory import CACHE_DTYPES, cache_bytes, encoder_step_bytes, step_bytes
from treadle.models.training_memory import (
    linear_weights,
    lora_parameters,
    master_bytes,
    moment_bytes,
    saved_bytes,
)

DEFAULT_DTYPE = "bfloat16"
DEFAULT_ENCODER_DTYPE = "float32"
_MOST_TOKENS = 1 << 24
_MOST_BATCH = 1 << 16
_MOST_RANK = 1 << 14
_MOST_BYTES = 1 << 60
_ADAPTER_BYTES = 4
"""Adapters are float32 whatever the model is, as PEFT has them."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by what they are for; serving has no gradients and no optimiser, training no cache."""

    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    parameters: int
    trained_parameters: int

    @property
    def total_bytes(self) -> int:
        """All of it at once."""
        return (
            self.weight_bytes
            + self.cache_bytes
            + self.activation_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
        )


def weight_bytes(config: AnyConfig, dtype: str, quantization: str = "") -> int:
    """Bytes of the weights as the worker holds them, tied ones once, scales included.

    Quantised are the linear layers of the blocks, and the head to 8 bits whatever the blocks are; a head that
    is tied to the embedding is then a second tensor. Norms and biases are counted at `dtype`, as is all of an
    encoder that `encoder_tensors.QUANTIZED` does not name.
    """
    tree = module_tree(config)
    if not quantization:
        return tree.num_parameters * DTYPE_BYTES[dtype]
    if isinstance(config, EncoderConfig):
        return _encoder_quantized(config, tree, dtype, quantization)
    head = quantized_bytes("int8", config.vocab_size, config.hidden_size)
    if not config.tie_word_embeddings:
        head -= config.vocab_size * config.hidden_size * DTYPE_BYTES[dtype]
    return _blocks_quantized(tree, dtype, quantization) + head


def estimate_serving(
    config: AnyConfig,
    *,
    dtype: str = "",
    quantization: str = "",
    cache_dtype: str = "",
    context: int = 0,
    batch: int = 0,
) -> MemoryEstimate:
    """Of an engine that runs `batch` sequences (0: one) of `context` tokens (0: the model's) at once.

    Empty types are the worker's defaults: bfloat16, float32 for an encoder, and the cache as the weights. An
    encoder has no cache. Raises InvalidArgument that names the field.
    """
    dtype, context, batch = _checked(config, dtype, quantization, context, batch)
    if context > (longest := _longest(config)):
        raise invalid_field(
            "context_length", f"is {context}; give at most the model's context, {longest} tokens"
        )
    if isinstance(config, EncoderConfig):
        return _encoder_serving(config, dtype, quantization, cache_dtype, context, batch)
    cache_dtype = cache_dtype or dtype
    if cache_dtype not in CACHE_DTYPES:
        raise _unknown("configuration.cache_dtype", cache_dtype, CACHE_DTYPES)
    return _bounded(
        weight_bytes=weight_bytes(config, dtype, quantization),
        cache_bytes=cache_bytes(config, context, batch, cache_dtype),
        activation_bytes=step_bytes(config, context, batch),
        gradient_bytes=0,
        optimizer_bytes=0,
        parameters=module_tree(config).num_parameters,
        trained_parameters=0,
    )


def _encoder_serving(
    config: EncoderConfig, dtype: str, quantization: str, cache_dtype: str, context: int, batch: int
) -> MemoryEstimate:
    if cache_dtype:
        raise invalid_field("configuration.cache_dtype", "an encoder has no cache; leave it empty")
    if quantization == "int4":
        raise invalid_field("configuration.quantization", "encoders are served as they are or as int8")
    return _bounded(
        weight_bytes=weight_bytes(config, dtype, quantization),
        cache_bytes=0,
        activation_bytes=encoder_step_bytes(config, context, batch),
        gradient_bytes=0,
        optimizer_bytes=0,
        parameters=module_tree(config).num_parameters,
        trained_parameters=0,
    )


def estimate_training(
    config: AnyConfig,
    *,
    dtype: str = "",
    quantization: str = "",
    context: int = 0,
    batch: int = 0,
    gradient_checkpointing: bool = False,
    lora_rank: int = 0,
) -> MemoryEstimate:
    """Of one process that steps with Adam over `batch` sequences of `context` tokens at once.

    `lora_rank` 0 trains every parameter: gradients as the weights, moments and, beside narrower weights, the
    weights themselves in float32. Else the model is frozen, and adapters of that rank are trained in
    float32. Raises InvalidArgument that names the field.
    """
    dtype, context, batch = _checked(config, dtype, quantization, context, batch)
    if not 0 <= lora_rank <= _MOST_RANK:
        raise invalid_field("lora_rank", f"must be 0 to {_MOST_RANK}; got {lora_rank}")
    if quantization and not lora_rank:
        raise invalid_field(
            "lora_rank", f"weights in {quantization} are not trained themselves; give the rank of an adapter"
        )
    tree, width = module_tree(config), DTYPE_BYTES[dtype]
    weights = _blocks_quantized(tree, dtype, quantization) if quantization else tree.num_parameters * width
    trained = lora_parameters(tree, lora_rank) if lora_rank else tree.num_parameters
    trained_width = _ADAPTER_BYTES if lora_rank else width
    return _bounded(
        weight_bytes=weights + (trained * _ADAPTER_BYTES if lora_rank else 0),
        cache_bytes=0,
        activation_bytes=saved_bytes(config, context * batch, width, checkpointing=gradient_checkpointing),
        gradient_bytes=trained * trained_width,
        optimizer_bytes=moment_bytes(trained) + master_bytes(trained, trained_width),
        parameters=tree.num_parameters,
        trained_parameters=trained,
    )


def check_precision(dtype: str, quantization: str, config: AnyConfig) -> str:
    """The dtype, or the model's default for ""; raises InvalidArgument for what nothing here computes in."""
    if quantization not in QUANTIZATIONS:
        raise _unknown("configuration.quantization", quantization, QUANTIZATIONS[1:])
    if dtype and dtype not in DTYPE_BYTES:
        raise _unknown("configuration.dtype", dtype, tuple(DTYPE_BYTES))
    return dtype or (DEFAULT_ENCODER_DTYPE if isinstance(config, EncoderConfig) else DEFAULT_DTYPE)


def _checked(
    config: AnyConfig, dtype: str, quantization: str, context: int, batch: int
) -> tuple[str, int, int]:
    dtype = check_precision(dtype, quantization, config)
    context, batch = context or _longest(config), batch or 1
    if not 0 < context <= _MOST_TOKENS:
        raise invalid_field("context_length", f"must be 1 to {_MOST_TOKENS} tokens; got {context}")
    if not 0 < batch <= _MOST_BATCH:
        raise invalid_field("batch_size", f"must be 1 to {_MOST_BATCH} sequences; got {batch}")
    return dtype, context, batch


def _longest(config: AnyConfig) -> int:
    """Tokens of the model's longest text."""
    return config.max_input_tokens if isinstance(config, EncoderConfig) else config.max_position_embeddings


def _bounded(**figures: int) -> MemoryEstimate:
    """Raises InvalidArgument for what no machine has, and no message holds."""
    estimate = MemoryEstimate(**figures)
    if estimate.total_bytes > _MOST_BYTES:
        raise invalid_field(
            "batch_size", f"takes more than {_MOST_BYTES} bytes; give fewer or shorter sequences"
        )
    return estimate


def _blocks_quantized(tree: ModuleTree, dtype: str, quantization: str) -> int:
    """Bytes with the blocks' linear layers quantised, and everything else at `dtype`."""
    linear = linear_weights(tree)
    kept = tree.num_parameters - sum(tensor.elements for tensor in linear)
    blocks = sum(quantized_bytes(quantization, tensor.shape[0], tensor.shape[1]) for tensor in linear)
    return kept * DTYPE_BYTES[dtype] + blocks


def _encoder_quantized(config: EncoderConfig, tree: ModuleTree, dtype: str, quantization: str) -> int:
    quantized = encoder_names(config).quantized_weights(config)
    kept = tree.num_parameters - sum(map(math.prod, quantized))
    products = sum(
        quantized_bytes(quantization, outputs, inputs, QUANTIZED_GROUP) for outputs, inputs in quantized
    )
    return kept * DTYPE_BYTES[dtype] + products


def _unknown(field: str, value: str, known: tuple[str, ...]) -> InvalidArgument:
    return invalid_field(field, f"{value[:40]!r} is unknown; these are counted: {', '.join(known)}")
