"""Tiny random models of every supported kind, with every parameter randomised."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "llama2": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3, "head_dim": 8, "tie_word_embeddings": False}),
    "llama_linear": ("Llama", {"rope_parameters": _LINEAR, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 40, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}
"""Heads have 16 elements, but for llama3's: 8 are too few for the native attention.
Name: class prefix in transformers, and what differs from the small configuration."""


def make(
    kind: str, folder: Path, seed: int, *, max_shard_size: str = "5GB", **sizes: object
) -> PreTrainedModel:
    """A random model of that kind, saved into `folder`; float32, eager attention. `sizes` are other ones."""
    prefix, changes = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**(_SMALL | changes | sizes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * spread)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * spread)
            else:
                parameter.copy_(spread * (1.2 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
