"""The ways in which a model can be computed, and how a test loads one and makes its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from treadle.models.config import ModelConfig
from treadle.nn.execution import Kernels, Quantization
from treadle.nn.llama import LlamaForCausalLM
from treadle.nn.loader import load_model
from treadle_worker.cuda.backends import BackendName
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.kv_cache import CachePlan, KVCache

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Profile:
    """What an engine is told."""

    name: str
    dtype: torch.dtype
    quantization: Quantization = ""
    cache_dtype: torch.dtype | None = None
    kernels: Kernels = "native"
    attention_backend: BackendName = "auto"

    def load(self, folder: Path) -> LlamaForCausalLM:
        """The model on the CPU."""
        model = load_model(folder, self.dtype, CPU, quantization=self.quantization, kernels=self.kernels)
        assert model.is_native == (self.kernels == "native")
        return model

    def cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        """A cache full of what an earlier owner may have left at the worst."""
        plan = CachePlan(
            config,
            block_size,
            self.cache_dtype or self.dtype,
            CPU,
            kernels=self.kernels,
            attention_backend=self.attention_backend,
        )
        assert plan.is_native == (self.kernels == "native" and config.head_dim % 16 == 0)
        cache = plan.build(num_blocks)
        for tensor in (cache.keys, cache.values):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -128)
        if isinstance(cache, CudaKVCache):
            cache.clear(torch.tensor([cache.zero_block]))
        if plan.dtype is torch.int8:
            cache.key_scales.fill_(torch.nan)
            cache.value_scales.fill_(torch.nan)
        return cache


FLOAT32 = Profile("float32", torch.float32)
BFLOAT16 = Profile("bfloat16", torch.bfloat16)
INT8 = Profile("int8", torch.bfloat16, "int8")
INT4 = Profile("int4", torch.bfloat16, "int4")
INT8_CACHE = Profile("int8_cache", torch.bfloat16, cache_dtype=torch.int8)
TORCH_FLOAT32 = Profile("torch_float32", torch.float32, kernels="torch")
TORCH_BFLOAT16 = Profile("torch_bfloat16", torch.bfloat16, kernels="torch")
SDPA_FLOAT32 = Profile("sdpa_float32", torch.float32, kernels="torch", attention_backend="sdpa")
SDPA_BFLOAT16 = Profile("sdpa_bfloat16", torch.bfloat16, kernels="torch", attention_backend="sdpa")
TORCH_INT8 = Profile("torch_int8", torch.bfloat16, "int8", kernels="torch")
PROFILES = [FLOAT32, BFLOAT16, INT8, INT4, INT8_CACHE, TORCH_FLOAT32, TORCH_BFLOAT16, TORCH_INT8]
