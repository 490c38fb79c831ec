"""How many blocks a cache has, and what is said where it does not fit."""

from __future__ import annotations

import random
import re

import pytest
import torch

from treadle.models.config import ModelConfig
from treadle_worker import device_memory, engine_loader
from treadle_worker.config import EngineConfig
from treadle_worker.engine_loader import DEFAULT_CACHE_BYTES, choose_num_blocks
from treadle_worker.engine_protocol import EngineStart
from treadle_worker.kv_cache import CachePlan

CPU = torch.device("cpu")
FREE = 3 << 30
LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 3, 2, 32, 16


def plan(dtype: torch.dtype, kernels: str = "torch") -> CachePlan:
    config = ModelConfig(
        model_type="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_windows=(None,) * LAYERS,
    )
    return CachePlan(config, BLOCK, dtype, CPU, kernels=kernels)


def start(**settings: object) -> EngineStart:
    return EngineStart(model_folder="folder", **EngineConfig(**settings).model_dump())


@pytest.fixture(autouse=True)
def _free(monkeypatch):
    for module in (engine_loader, device_memory):
        monkeypatch.setattr(module, "free_bytes", lambda device: FREE)


BLOCK_BYTES = {
    torch.bfloat16: 2 * LAYERS * KV_HEADS * BLOCK * HEAD_DIM * 2,
    torch.float32: 2 * LAYERS * KV_HEADS * BLOCK * HEAD_DIM * 4,
    torch.int8: 2 * LAYERS * KV_HEADS * BLOCK * (HEAD_DIM + 4),
}


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize(("dtype", "block_bytes"), BLOCK_BYTES.items(), ids=str)
def test_blocks_for_bytes_a_share_a_number_and_nothing_said(dtype, block_bytes, kernels):
    made = plan(dtype, kernels)
    assert made.bytes_per_block == block_bytes
    held = made.build(5)
    tensors = [held.keys, held.values, held.key_scales, held.value_scales]
    assert sum(tensor.nbytes for tensor in tensors) == 5 * block_bytes
    cases = [
        ({}, DEFAULT_CACHE_BYTES // block_bytes),
        ({"kv_cache_bytes": 1 << 20}, (1 << 20) // block_bytes),
        ({"num_blocks": 7, "kv_cache_bytes": 1 << 20}, 7),
        ({"max_memory_percent": 50}, FREE // 2 // block_bytes),
        ({"max_memory_percent": 50, "kv_cache_bytes": 1 << 20}, (1 << 20) // block_bytes),
    ]
    for settings, expected in cases:
        assert choose_num_blocks(start(**settings), made) == expected, settings
    print(f"{dtype}: {block_bytes} bytes a block, {len(cases)} settings")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_blocks": 10**6}, "num_blocks = 1000000"),
        ({"kv_cache_bytes": 5 << 30}, f"kv_cache_bytes = {5 << 30}"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_figures_and_the_way_out(settings, named):
    made = plan(torch.bfloat16)
    with pytest.raises(MemoryError, match=re.escape(named)) as caught:
        choose_num_blocks(start(**settings), made)
    message = str(caught.value)
    print(message)
    assert str(FREE) in message
    most = int(re.search(r"at most (\d+) blocks", message)[1])
    assert choose_num_blocks(start(num_blocks=most), made) == most
    with pytest.raises(MemoryError):
        choose_num_blocks(start(num_blocks=most + random.randint(1, 1000)), made)


def test_a_default_that_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr(engine_loader, "free_bytes", lambda device: DEFAULT_CACHE_BYTES // 2)
    with pytest.raises(MemoryError, match="default of kv_cache_bytes"):
        choose_num_blocks(start(), plan(torch.bfloat16))


def test_a_profile_names_what_an_answer_depends_on():
    ids = {
        EngineConfig(**settings).profile("sha256:0").id
        for settings in (
            {},
            {"quantization": "int8"},
            {"quantization": "int4"},
            {"cache_dtype": "int8"},
            {"dtype": "float32"},
            {"quantization": "int8", "cache_dtype": "int8"},
        )
    }
    assert len(ids) == 6
    same = [{"cache_dtype": "bfloat16"}, {"num_blocks": 5}, {"num_speculative_tokens": 0}]
    for settings in same:
        assert EngineConfig(**settings).profile("sha256:0").id in ids
