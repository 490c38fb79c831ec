"""A GGUF file's metadata as config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle_registry.formats.gguf_blocks import dequantize
from treadle_registry.formats.gguf_reader import GgufFile, corrupt
from treadle_registry.formats.gguf_rope import llama3_scaling

ROPE_FREQUENCIES = "rope_freqs.weight"

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"} | {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")

_CHANGES_NUMBERS = (
    "attention.clamp_kqv",
    "attention.scale",
    "attention.temperature_length",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "use_parallel_residual",
)
"""Keys of variants that no code here computes: refused, since leaving them out would change the numbers."""


def architecture(file: GgufFile) -> str:
    """ "llama", "qwen2" or "qwen3"; raises FailedPrecondition (UNSUPPORTED_ARCHITECTURE) for others."""
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        of_encoder = "; import an encoder's Hugging Face folder instead" if str(name).endswith("bert") else ""
        raise FailedPrecondition(
            f"{file.path.name} has the architecture {name!r:.80}; supported: {', '.join(_ARCHITECTURES)}"
            f"{of_encoder}",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    return str(name)


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """config.json as transformers would have written it, with what the tensors tell."""
    read = _Metadata(file, architecture(file))
    hidden, heads = read.whole("embedding_length"), read.whole("attention.head_count")
    head_dim = read.whole("attention.key_length", hidden // heads)
    if read.whole("attention.value_length", head_dim) != head_dim:
        raise read.unsupported("attention.value_length", f"must equal the keys' ({head_dim})")
    if read.whole("rope.dimension_count", head_dim) != head_dim:
        raise read.unsupported("rope.dimension_count", f"must equal the head's size ({head_dim})")
    for key in _CHANGES_NUMBERS:
        if read.get(key):
            raise read.unsupported(key, "is not supported")
    window = read.get("attention.sliding_window")
    model_type = "mistral" if read.name == "llama" and window else read.name
    config: dict[str, Any] = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": read.whole("feed_forward_length"),
        "num_hidden_layers": read.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": read.whole("context_length"),
        "rms_norm_eps": read.real("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": read.real("rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
    }
    if scaling := _rope_scaling(read, config):
        config["rope_scaling"] = scaling
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    elif window:
        config |= {"sliding_window": read.whole("attention.sliding_window")}
        if model_type != "mistral":
            config |= {"use_sliding_window": True, "max_window_layers": 0}
    return config | _token_ids(file, config["vocab_size"])


def generation_config_from_gguf(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: every id that ends an answer, and those of bos and pad."""
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    ends = [config[key] for key in ("eos_token_id",) if key in config]
    for key in ("eot", "eom"):
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int and 0 <= token < config["vocab_size"] and token not in ends:
            ends.append(token)
    return ids | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


class _Metadata:
    """The keys of one architecture, checked."""

    def __init__(self, file: GgufFile, name: str) -> None:
        self.file, self.name = file, name

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.name}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 31:
            raise corrupt(self.file.path, f"{self.name}.{key} must be a positive whole number; got {value!r}")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not float or not 0 < value < 1e12:
            raise corrupt(self.file.path, f"{self.name}.{key} must be a number above 0; got {value!r}")
        # The shortest decimal of the float32, so that 9.999999747378752e-06 is the 1e-05 that was meant.
        return float(str(np.float32(value)))

    def unsupported(self, key: str, what: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self.file.path.name}: {self.name}.{key} = {self.get(key)!r} {what}",
            reason="UNSUPPORTED_ARCHITECTURE",
        )


def _vocab_size(file: GgufFile) -> int:
    """The embedding's rows: some files pad the embedding past the tokens."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise corrupt(file.path, "it has no matrix token_embd.weight")
    return embedding.shape[0]


def _rope_scaling(read: _Metadata, config: Mapping[str, Any]) -> dict[str, Any] | None:
    frequencies = read.file.tensors.get(ROPE_FREQUENCIES)
    if frequencies is not None:
        factors = np.concatenate(list(dequantize(read.file.data(frequencies), frequencies.format)))
        try:
            return llama3_scaling(factors, config["rope_theta"], config["head_dim"])
        except ValueError as error:
            raise InvalidArgument(
                f"{read.file.path.name}: {ROPE_FREQUENCIES} {error}", reason="UNSUPPORTED_ROPE_FREQUENCIES"
            ) from error
    kind = read.get("rope.scaling.type")
    if kind in (None, "none"):
        legacy = read.get("rope.scale_linear")
        return {"rope_type": "linear", "factor": read.real("rope.scale_linear", 1.0)} if legacy else None
    if kind != "linear":
        raise read.unsupported("rope.scaling.type", "is not supported; linear and llama3 scaling are")
    return {"rope_type": "linear", "factor": read.real("rope.scaling.factor", 1.0)}


def _token_ids(file: GgufFile, vocab_size: int) -> dict[str, int]:
    ids = {}
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise corrupt(file.path, f"tokenizer.ggml.{name}_token_id is {value!r}, no id of {vocab_size}")
        ids[key] = value
    return ids
