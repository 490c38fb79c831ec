"""What an adapter adds, against a slow reference, and what is refused, by its name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_folder import SIZES, lora_tensors, write_adapter
from small_folder import CONFIG

from treadle.errors import InvalidArgument
from treadle.models.config import ModelConfig, parse_config
from treadle_registry.formats.peft_adapter import PeftAdapter, adapter_files

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
PREFIX = "base_model.model."


@pytest.fixture
def config() -> ModelConfig:
    return parse_config(CONFIG)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_added(tmp_path: Path, config: ModelConfig, rng, rslora, dtype):
    rank, alpha = rng.randint(1, 9), rng.choice([1, 2.5, 16])
    tensors = lora_tensors(rng.randrange(1 << 31), rank, dtype)
    folder = write_adapter(tmp_path / "adapter", tensors, r=rank, lora_alpha=alpha, use_rslora=rslora)
    adapter = PeftAdapter(folder, config)
    assert adapter.tensors == {f"{Q_PROJ}.weight", f"{DOWN_PROJ}.weight"}
    compared = 0
    for module, (outputs, inputs) in zip((Q_PROJ, DOWN_PROJ), SIZES.values(), strict=True):
        a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].tolist() for part in "AB")
        low_rank = adapter.load(f"{module}.weight")
        first = rng.randrange(outputs - 3)
        rows = low_rank.rows(first, 3)
        assert rows.shape == (3, inputs)
        for row in range(3):
            for column in range(inputs):
                sum_ = math.fsum(b[first + row][k] * a[k][column] for k in range(rank))
                due = sum_ * alpha / (math.sqrt(rank) if rslora else rank)
                assert rows[row, column] == pytest.approx(due, rel=1e-6, abs=1e-7)
                compared += 1
    print(f"{compared} values as the reference has them")
    assert compared == 3 * (32 + 48)


def test_rank_and_alpha_of_a_module(tmp_path: Path, config: ModelConfig):
    tensors = lora_tensors(rank=4)
    for part, cut in (("A", np.s_[:2]), ("B", np.s_[:, :2])):
        name = f"{PREFIX}{Q_PROJ}.lora_{part}.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][cut])
    folder = write_adapter(
        tmp_path / "adapter",
        tensors,
        rank_pattern={"self_attn.q_proj": 2, "q_proj": 7},
        alpha_pattern={"layers.0.mlp.down_proj": 1},
    )
    adapter = PeftAdapter(folder, config)
    for module, scaling in ((Q_PROJ, 8 / 2), (DOWN_PROJ, 1 / 4)):
        a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        due = (scaling * (b @ a)).astype(np.float32)
        assert np.allclose(adapter.load(f"{module}.weight").rows(0, 32), due, rtol=1e-6, atol=0)


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in lora_tensors().items() if name not in names}


ODD = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "tensors", "reason", "named"),
    [
        ({"peft_type": "IA3"}, None, "UNSUPPORTED_ADAPTER", "peft_type 'IA3'"),
        ({"peft_type": None}, None, "UNSUPPORTED_ADAPTER", "peft_type None"),
        ({"use_dora": True}, None, "UNSUPPORTED_ADAPTER", "use_dora"),
        ({"bias": "all"}, None, "UNSUPPORTED_ADAPTER", "bias 'all'"),
        ({"lora_bias": True}, None, "UNSUPPORTED_ADAPTER", "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, None, "UNSUPPORTED_ADAPTER", "modules_to_save"),
        ({"layer_replication": [[0, 1], [0, 1]]}, None, "UNSUPPORTED_ADAPTER", "layer_replication"),
        ({"target_parameters": ["x"]}, None, "UNSUPPORTED_ADAPTER", "target_parameters"),
        ({"trainable_token_indices": [1]}, None, "UNSUPPORTED_ADAPTER", "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, None, "UNSUPPORTED_ADAPTER", "alora_invocation_tokens"),
        ({"use_something_new": True}, None, "UNSUPPORTED_ADAPTER", "use_something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "UNSUPPORTED_ADAPTER", "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, None, "UNSUPPORTED_ADAPTER", "olora"),
        ({"rank_pattern": {"(q|k)_proj": 4}}, None, "UNSUPPORTED_ADAPTER", "(q|k)_proj"),
        ({"rank_pattern": {"(a+)+b": 4}}, None, "UNSUPPORTED_ADAPTER", "(a+)+b"),
        ({"rank_pattern": [4]}, None, "CORRUPT_ADAPTER", "rank_pattern"),
        ({"r": 0}, None, "CORRUPT_ADAPTER", "r must be"),
        ({"r": True}, None, "CORRUPT_ADAPTER", "r must be"),
        ({"r": 1 << 40}, None, "CORRUPT_ADAPTER", "r must be"),
        ({"lora_alpha": "8"}, None, "CORRUPT_ADAPTER", "lora_alpha"),
        ({"lora_alpha": 10**400}, None, "CORRUPT_ADAPTER", "lora_alpha"),
        ({"lora_alpha": math.inf}, None, "CORRUPT_ADAPTER", "lora_alpha"),
        ({"r": 8}, None, "ADAPTER_MISMATCH", "lora_A"),
        ({"target_modules": ["q_proj"]}, None, "CORRUPT_ADAPTER", "mlp.down_proj"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, None, "CORRUPT_ADAPTER", "v_proj"),
        ({}, {}, "CORRUPT_ADAPTER", "no tensors"),
        ({}, without(f"{PREFIX}{Q_PROJ}.lora_B.weight"), "CORRUPT_ADAPTER", "q_proj"),
        (
            {},
            lora_tensors() | {f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": ODD},
            "UNSUPPORTED_ADAPTER",
            "lora_magnitude_vector",
        ),
        (
            {},
            lora_tensors() | {f"{PREFIX}model.embed_tokens.lora_embedding_A": ODD},
            "UNSUPPORTED_ADAPTER",
            "lora_embedding_A",
        ),
        (
            {"target_modules": "all-linear"},
            {f"{PREFIX}lm_head.lora_{part}.weight": ODD for part in "AB"},
            "UNSUPPORTED_ADAPTER",
            "lm_head",
        ),
        (
            {"target_modules": "x"},
            {f"{PREFIX}model.layers.7.mlp.up_proj.lora_{part}.weight": ODD for part in "AB"},
            "ADAPTER_MISMATCH",
            "model.layers.7.mlp.up_proj",
        ),
        (
            {"target_modules": "x"},
            {f"{PREFIX}model.norm.lora_{part}.weight": ODD for part in "AB"},
            "ADAPTER_MISMATCH",
            "model.norm",
        ),
        (
            {"target_modules": "x"},
            {f"{PREFIX}model.embed_tokens.lora_{part}.weight": ODD for part in "AB"},
            "ADAPTER_MISMATCH",
            "model.embed_tokens",
        ),
        (
            {},
            {name: tensor.astype(np.int8) for name, tensor in lora_tensors().items()},
            "CORRUPT_ADAPTER",
            "I8",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str | dict) and value else None,
)
def test_what_is_refused(
    tmp_path: Path, config: ModelConfig, changes: dict[str, Any], tensors: Any, reason: str, named: str
):
    folder = write_adapter(tmp_path / "adapter", tensors, **changes)
    with pytest.raises(InvalidArgument) as caught:
        PeftAdapter(folder, config)
    print(caught.value.message)
    assert caught.value.reason == reason
    assert named in caught.value.message


def test_values_that_are_not_finite(tmp_path: Path, config: ModelConfig):
    tensors = lora_tensors()
    tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"][3, 1] = np.nan
    adapter = PeftAdapter(write_adapter(tmp_path / "adapter", tensors), config)
    adapter.load(f"{DOWN_PROJ}.weight")
    with pytest.raises(InvalidArgument, match=r"self_attn\.q_proj"):
        adapter.load(f"{Q_PROJ}.weight")


def test_an_adapter_s_files(tmp_path: Path):
    folder = write_adapter(tmp_path / "adapter")
    assert [path.name for path in adapter_files(folder).values()] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "adapter_model.safetensors").rename(outside)
    reasons = []
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    for prepare in (
        lambda: None,
        lambda: (folder / "adapter_model.bin").unlink(),
        lambda: (folder / "adapter_model.safetensors").symlink_to(outside),
    ):
        prepare()
        with pytest.raises(InvalidArgument) as caught:
            adapter_files(folder)
        print(caught.value.message)
        reasons.append(caught.value.reason)
    assert reasons == ["PICKLE_WEIGHTS", "MISSING_FILE", "PATH_OUTSIDE"]
