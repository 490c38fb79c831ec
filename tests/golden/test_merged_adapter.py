"""Adapters that PEFT saved, merged by the registry as PEFT merges them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_folder import TOKENIZER
from tiny_models import make

from treadle_registry.operations.deriving import derive
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.store import Store

# PEFT asks transformers 5.24 by names that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "all": {"target_modules": "all-linear", "r": 8, "lora_alpha": 4, "lora_dropout": 0.1},
    "rslora": {"target_modules": ["down_proj", "gate_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"o_proj": 5, "model.layers.1.self_attn.q_proj": 1},
        "alpha_pattern": {"up_proj": 9, "layers.0.self_attn.q_proj": 0.5},
    },
    "layers": {
        "target_modules": ["k_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "r": 4,
        "lora_alpha": 8,
        "fan_in_fan_out": False,
    },
    "pattern": {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj", "r": 6, "lora_alpha": 6},
}


@pytest.mark.parametrize("kind", ["smollm2", "qwen2_window"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_as_peft_merges(adapter, kind, dtype, tmp_path: Path, rng: random.Random):
    folder, saved = tmp_path / "folder", tmp_path / "adapter"
    model = make(kind, folder, rng.randrange(1 << 31))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    store = Store.open(tmp_path / "store")
    parent = import_source(store, LocalSource("folder", str(folder)))
    canonical = load_file(parent.canonical_folder / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in canonical.items()}, strict=False)

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[adapter]))
    torch.manual_seed(rng.randrange(1 << 31))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            # Values that both types have, since PEFT merges with what it saves.
            parameter.data = (torch.randn_like(parameter) * 0.2).to(dtype).float()
    adapted.save_pretrained(saved)
    merged = adapted.merge_and_unload().state_dict()

    derived = derive(store, parent.manifest.digest, Derivation("adapter_merge", "", str(saved)))
    stored = load_file(derived.canonical_folder / "model.safetensors")
    assert stored.keys() == canonical.keys()
    total = changed = off = 0
    for name, ours in stored.items():
        due = merged[name].bfloat16()
        changed += int((ours != canonical[name]).sum())
        off += int((ours != due).sum())
        total += ours.numel()
        # The order of PEFT's float32 sums may move what lies halfway by one step of bfloat16, and shows in
        # what is left where a weight and its change all but cancel out.
        assert ((ours.float() - due.float()).abs() <= due.float().abs() * 2**-7 + 1e-6).all()
    print(f"{changed} of {total} weights changed; {off} are rounded another way than PEFT's")
    assert changed > 0
    assert off <= total / 2000
    assert derived.manifest.parent_digest == parent.manifest.digest
    assert derived.manifest.derivation is not None
    assert [file.path for file in derived.manifest.source_files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
