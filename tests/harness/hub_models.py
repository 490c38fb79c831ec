"""Models as repositories of a hub have them, a few hundred kilobytes each."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from small_folder import write_model

from treadle.models.config import parse_config
from treadle.models.llama import expected_tensors
from treadle_registry.formats.bfloat16 import round_to_bfloat16
from treadle_registry.formats.safetensors_file import bfloat16_header

REPOSITORY = "river/sea"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CARD = "---\nlicense: apache-2.0\n---\nA model for tests.\n"


def model_files(*, seed: int = 0, **config: Any) -> dict[str, bytes]:
    """A repository with one file of float32 weights (about 400 kB), and more than a model needs."""
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 1} | config
        made = write_model(Path(folder) / "model", seed=seed, template="{{ messages }}", **shape)
        files = {path.name: path.read_bytes() for path in made.iterdir()}
    return files | {
        "README.md": _CARD.encode(),
        "generation_config.json": json.dumps({"eos_token_id": 0, "temperature": 0.5}).encode(),
        "tokenizer_config.json": json.dumps({"model_max_length": 128}).encode(),
        # What nobody asks for.
        "pytorch_model.bin": b"\x80\x04pickle" * 1000,
        "tf_model.h5": b"tensorflow" * 1000,
        "training_args.json": b"{}",
        "onnx/model.onnx": b"onnx" * 2000,
    }


def bfloat16_shards(files: dict[str, bytes], shards: int, variant: str = "") -> dict[str, bytes]:
    """The same repository with random bfloat16 weights in so many files and their index; 1: in one file."""
    config = parse_config(json.loads(files["config.json"]))
    random = np.random.default_rng(7)
    tensors = {
        name: round_to_bfloat16(random.standard_normal(shape).astype(np.float32))
        for name, shape in expected_tensors(config).items()
    }
    middle = f".{variant}" if variant else ""
    names = sorted(tensors)
    made, weight_map = {}, {}
    for number in range(shards):
        part = names[number::shards]
        name = (
            f"model{middle}-{number + 1:05d}-of-{shards:05d}.safetensors"
            if shards > 1
            else f"model{middle}.safetensors"
        )
        shapes = {tensor: tensors[tensor].shape for tensor in part}
        made[name] = bfloat16_header(shapes) + b"".join(tensors[tensor].tobytes() for tensor in part)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = f"model.safetensors.index.{variant}.json" if variant else INDEX
        made[index] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {name: data for name, data in files.items() if name != SINGLE} | made
