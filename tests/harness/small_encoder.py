"""The smallest encoders: Hugging Face folders of a few kilobytes, as transformers and others write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from small_folder import TOKENIZER

from treadle.models.bfloat16 import round_to_bfloat16
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import expected_tensors, optional_tensors, parse_any_config

Kind = Literal["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]
"""Type, shape and bytes by name."""

_CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}
_OF_DISTILBERT = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
_PRE_TRAINED = {
    "bert": ("cls.predictions.bias", "cls.predictions.transform.dense.weight", "cls.seq_relationship.weight"),
    "roberta": ("lm_head.bias", "lm_head.dense.weight", "lm_head.decoder.weight"),
    "distilbert": ("vocab_projector.bias", "vocab_transform.weight", "vocab_layer_norm.weight"),
}
"""Tensors of heads that nobody needs."""

POOLED = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NORMALIZED = [
    *POOLED,
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
MEAN = {
    "word_embedding_dimension": 16,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}
SENTENCE_FILES: dict[str, Any] = {
    "modules.json": NORMALIZED,
    "1_Pooling/config.json": MEAN,
    "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "find: ", "passage": ""}},
}
"""What sentence-transformers writes beside a model that embeds."""


def encoder_config(model_type: str = "bert", kind: Kind = "Model", **changes: Any) -> dict[str, Any]:
    """config.json; a change to None leaves the key out."""
    raw = SIZES | (_OF_DISTILBERT if model_type == "distilbert" else {})
    raw |= {"model_type": model_type, "architectures": [f"{_CLASSES[model_type]}{kind}"]}
    return {key: value for key, value in (raw | changes).items() if value is not None}


def parsed(raw: Mapping[str, Any]) -> EncoderConfig:
    """The same, read."""
    config = parse_any_config(dict(raw))
    assert isinstance(config, EncoderConfig)
    return config


def canonical_tensors(raw: Mapping[str, Any], *, seed: int = 0, dtype: str = "F32") -> dict[str, Any]:
    """Random tensors by their canonical names, the pooler of a bare encoder among them."""
    config, random = parsed(raw), np.random.default_rng(seed)
    shapes = expected_tensors(config) | optional_tensors(config)
    return {
        name: (dtype, shape, _bytes(random.standard_normal(shape), dtype)) for name, shape in shapes.items()
    }


def foreign_tensors(raw: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The same tensors as a model with a head of TensorFlow's time names them, and what else it has."""
    config = parsed(raw)
    prefix = config.model_type
    heads = ("classifier", "pre_classifier")
    named = {}
    for name, tensor in tensors.items():
        old = name
        if "orm." in name:
            old = name.replace("orm.weight", "orm.gamma").replace("orm.bias", "orm.beta")
        named[old if name.startswith(heads) else f"{prefix}.{old}"] = tensor
    ids = np.arange(40, dtype=np.int64)[None]
    named[f"{prefix}.embeddings.position_ids"] = ("I64", ids.shape, ids.tobytes())
    return named | {name: ("F32", (16,), bytes(64)) for name in _PRE_TRAINED[prefix]}


def _bytes(values: Any, dtype: str) -> bytes:
    floats = values.astype(np.float32)
    if dtype == "BF16":
        return round_to_bfloat16(floats).tobytes()
    return floats.astype(np.float32 if dtype == "F32" else np.float16).tobytes()


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """A file of these tensors, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_safetensors(path: Path) -> dict[str, Any]:
    """What `write_safetensors` was given."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), content[start + begin : start + end])
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def write_encoder(
    folder: Path,
    raw: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
    *,
    shards: int = 1,
    files: Mapping[str, Any] | None = None,
) -> Path:
    """A folder of `raw` (a bare BERT), with these tensors and JSON `files` beside; None leaves one out."""
    raw = encoder_config() if raw is None else raw
    tensors = canonical_tensors(raw) if tensors is None else tensors
    folder.mkdir(parents=True)
    beside = {"config.json": raw, "tokenizer.json": TOKENIZER} | dict(files or {})
    for name, content in beside.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    places = {}
    for number in range(shards):
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / name, part)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
