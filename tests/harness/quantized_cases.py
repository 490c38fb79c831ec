"""Quantised checkpoints with what is to be found in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from quantized_folders import (
    CONFIG,
    Tensors,
    awq_gemm,
    awq_gemv,
    bitsandbytes,
    compressed,
    compressed_config,
    fp8,
    gptq,
    kept,
    linear_layers,
    write_checkpoint,
)

from treadle.errors import TreadleError
from treadle_registry.formats.inspection import Inspection
from treadle_registry.operations.importing import import_source
from treadle_registry.operations.job import event_from_json, event_to_json
from treadle_registry.sources.inspecting import inspect_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store

QUANTIZED = sum(math.prod(shape) for shape in linear_layers().values())
KEPT = sum(math.prod(shape) for _, shape in kept().values())

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BNB4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_skip_modules": ["lm_head"],
}

Case = tuple[Tensors, dict[str, Any], dict[str, Any]]
"""Tensors, quantization_config, and what is found."""

DESCRIBED: dict[str, Case] = {
    "GPTQ": (
        gptq(),
        GPTQ,
        {"method": "gptq", "format": "gptq", "bits": 4, "group_size": 128, "symmetric": True},
    ),
    "GPTQ of 8 bits, act-order, v2": (
        gptq(8, 32),
        GPTQ | {"bits": 8, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq_v2", "sym": False},
        {"format": "gptq_v2", "bits": 8, "group_size": 32, "activation_order": True, "symmetric": False},
    ),
    "GPTQ of 3 bits, whole rows, no g_idx": (
        gptq(3, -1, g_idx=False),
        GPTQ | {"bits": 3, "group_size": -1},
        {"bits": 3, "group_size": 0, "strategy": "channel"},
    ),
    "GPTQ of 2 bits": (gptq(2, 64), GPTQ | {"bits": 2, "group_size": 64}, {"bits": 2}),
    "AWQ": (awq_gemm(), AWQ, {"method": "awq", "format": "gemm", "bits": 4, "symmetric": False}),
    "AWQ as llm-awq says it": (
        awq_gemm(64),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
        {"format": "gemm", "group_size": 64},
    ),
    "AWQ gemv": (awq_gemv(), AWQ | {"version": "gemv", "group_size": 64}, {"format": "gemv"}),
    "AWQ gemv, small groups": (awq_gemv(32), AWQ | {"version": "gemv", "group_size": 32}, {"group_size": 32}),
    "AWQ gemv_fast": (
        awq_gemv(128, fast=True),
        AWQ | {"version": "gemv_fast"},
        {"format": "gemv_fast", "bits": 4},
    ),
    "compressed: W4A16 groups": (
        compressed("pack-quantized"),
        compressed_config("pack-quantized", {"group_size": 128}),
        {"method": "compressed-tensors", "format": "pack-quantized", "bits": 4, "strategy": "group"},
    ),
    "compressed: W8A16 channels": (
        compressed("pack-quantized", "channel", bits=8),
        compressed_config("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        {"bits": 8, "strategy": "channel", "activation_bits": 0},
    ),
    "compressed: W8A8": (
        compressed("int-quantized", "channel"),
        compressed_config(
            "int-quantized",
            {"num_bits": 8, "strategy": "channel"},
            {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"},
        ),
        {"format": "int-quantized", "bits": 8, "activation_bits": 8},
    ),
    "compressed: FP8 a tensor": (
        compressed("float-quantized", "tensor"),
        compressed_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        {"format": "float-quantized", "strategy": "tensor"},
    ),
    "compressed: FP8 blocks": (
        compressed("float-quantized", "block"),
        compressed_config(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        ),
        {"strategy": "block"},
    ),
    "compressed: NVFP4": (
        compressed("nvfp4-pack-quantized"),
        compressed_config(
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        {"bits": 4, "group_size": 16},
    ),
    "compressed: MXFP4": (
        compressed("mxfp4-pack-quantized"),
        compressed_config("mxfp4-pack-quantized", {"type": "float", "group_size": 32}),
        {"bits": 4, "group_size": 32},
    ),
    "bitsandbytes nf4": (bitsandbytes("nf4"), BNB4, {"method": "bitsandbytes", "format": "nf4", "bits": 4}),
    "bitsandbytes fp4": (bitsandbytes("fp4"), BNB4 | {"bnb_4bit_quant_type": "fp4"}, {"format": "fp4"}),
    "bitsandbytes int8": (
        bitsandbytes("int8"),
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        {"format": "int8", "bits": 8, "strategy": "channel", "activation_bits": 8},
    ),
    "FP8 blocks": (
        fp8(),
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        {"method": "fp8", "bits": 8, "strategy": "block", "activation_bits": 8},
    ),
    "FP8 tensors": (
        fp8(blocks=False),
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"strategy": "tensor"},
    ),
}


def inspected(tmp_path: Path, tensors: Tensors, quantization: Any, **files: Any) -> Inspection:
    """What is said of such a folder; an import must say the same, and leave nothing."""
    config = CONFIG | ({"quantization_config": quantization} if quantization is not None else {})
    source = LocalSource("folder", str(write_checkpoint(tmp_path / "model", tensors, config, **files)))
    found = inspect_source(source)
    store = Store.open(tmp_path / "store")
    with pytest.raises(TreadleError) as caught:
        import_source(store, source)
    assert found.refusal is not None
    assert (caught.value.reason, caught.value.message) == (found.refusal.reason, found.refusal.message)
    assert {path.name for path in store.root.rglob("*") if path.is_file()} <= {"store.lock", "format.json"}
    assert event_from_json(json.loads(json.dumps(event_to_json(found)))).facts == found.facts
    return found
