"""Tiny random encoders of every kind, every parameter randomised, and their canonical folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from treadle.models.families import canonical_name, parse_any_config

VOCABULARY = 97
_SMALL: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 130,
    "type_vocab_size": 2,
}
_DISTIL: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "dim": 96,
    "hidden_dim": 80,
    "n_layers": 3,
    "n_heads": 6,
    "max_position_embeddings": 130,
}
CLASSES = {
    "bert": ("Bert", _SMALL),
    "roberta": ("Roberta", _SMALL),
    "xlm-roberta": ("XLMRoberta", _SMALL),
    "distilbert": ("DistilBert", _DISTIL),
}
"""Model type: what the classes of transformers begin with, and a small configuration."""
SUFFIXES = {"": "Model", "sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


def make(kind: str, head: str, seed: int, **changes: object) -> PreTrainedModel:
    """A random model of that model type with that head; float32, eager attention."""
    prefix, small = CLASSES[kind]
    config = getattr(transformers, f"{prefix}Config")(**(small | changes))
    config._attn_implementation = "eager"
    return randomised(getattr(transformers, f"{prefix}{SUFFIXES[head]}")(config).eval(), seed)


def randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with every parameter drawn anew, norms and biases, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower():
                parameter.copy_((name.endswith("weight")) + 0.3 * spread)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * spread)
            else:
                parameter.copy_(spread * (1.2 / parameter.shape[-1] ** 0.5))
    return model


def save_canonical(model: PreTrainedModel, folder: Path) -> Path:
    """The model's canonical folder: what an import makes of what transformers saves."""
    source = folder / "source"
    model.save_pretrained(source)
    return canonical_folder(source, load_file(source / "model.safetensors"), folder / "canonical")


def canonical_folder(source: Path, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """config.json of `source`, and the tensors under their canonical names."""
    config = parse_any_config(json.loads((source / "config.json").read_text()))
    named = {canonical_name(config, name): tensor for name, tensor in tensors.items()}
    folder.mkdir()
    save_file({name: each for name, each in named.items() if name}, folder / "model.safetensors")
    shutil.copyfile(source / "config.json", folder / "config.json")
    return folder
