"""LoRA adapters as PEFT saves them, written by hand: right ones, and whatever a test wants to see refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somewhere",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "r": 4,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
SIZES = {"q_proj": (32, 32), "down_proj": (32, 48)}
"""Outputs and inputs of the products in `small_folder.CONFIG`."""


def lora_tensors(seed: int = 0, rank: int = 4, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random A and B for the model of `small_folder`."""
    random = np.random.default_rng(seed)
    tensors = {}
    for product, (outputs, inputs) in SIZES.items():
        part = "self_attn" if product == "q_proj" else "mlp"
        name = f"base_model.model.model.layers.0.{part}.{product}"
        tensors[f"{name}.lora_A.weight"] = random.standard_normal((rank, inputs)).astype(dtype)
        tensors[f"{name}.lora_B.weight"] = random.standard_normal((outputs, rank)).astype(dtype)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """An adapter of that model."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(lora_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder
