"""The smallest model that runs: a Hugging Face folder of a few kilobytes, written in a millisecond."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from treadle.models.config import parse_config
from treadle.models.llama import expected_tensors

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
WORDS = ["<eos>", *"the river runs to a sea of stars and under old stone bridges".split()]
TOKENIZER = {
    "version": "1.0",
    "model": {
        "type": "WordLevel",
        "vocab": {word: number for number, word in enumerate(dict.fromkeys(WORDS))},
        "unk_token": "<eos>",
    },
    "pre_tokenizer": {"type": "Whitespace"},
}


def write_model(folder: Path, *, seed: int = 0, template: str = "", **config: Any) -> Path:
    """A tiny Llama as a Hugging Face folder."""
    folder.mkdir(parents=True)
    parsed = CONFIG | config
    (folder / "config.json").write_text(json.dumps(parsed))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    random = np.random.default_rng(seed)
    shapes = expected_tensors(parse_config(parsed))
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
