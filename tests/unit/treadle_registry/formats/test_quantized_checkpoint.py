"""Quantised checkpoints: what they are said to be, and what they are refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quantized_cases import DESCRIBED, GPTQ, KEPT, QUANTIZED, inspected
from quantized_folders import (
    CONFIG,
    Tensors,
    awq_gemm,
    fp8,
    gptq,
    kept,
    treadles_own,
    write_checkpoint,
)
from small_folder import write_model

from treadle.errors import FailedPrecondition
from treadle_registry.sources.inspecting import inspect_source
from treadle_registry.sources.source import LocalSource


@pytest.mark.parametrize("case", DESCRIBED)
def test_described(tmp_path: Path, case: str):
    tensors, config, expected = DESCRIBED[case]
    found = inspected(tmp_path, tensors, config)
    quantization, refusal = found.quantization, found.refusal
    assert quantization is not None
    assert {name: getattr(quantization, name) for name in expected} == expected
    assert quantization.problems == ()
    assert (quantization.quantized_parameters, quantization.unquantized_parameters) == (QUANTIZED, KEPT)
    assert found.facts.parameters == QUANTIZED + KEPT
    assert found.facts.model_type == "llama"
    assert sum(share.bytes for share in found.facts.dtypes) < 2 * found.facts.parameters
    assert isinstance(refusal, FailedPrecondition)
    assert refusal.reason == "UNSUPPORTED_QUANTIZATION"
    assert quantization.summary in refusal.message
    assert "unquantised" in refusal.message, "a way out"
    print(refusal.message)


@pytest.mark.parametrize(
    ("files", "method"),
    [
        ({"quantize_config__json": {"bits": 4, "group_size": 128, "desc_act": True, "sym": False}}, "gptq"),
        (
            {"quant_config__json": {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}},
            "awq",
        ),
        ({"hf_quant_config__json": {"producer": {}, "quantization": {"quant_algo": "FP8"}}}, "modelopt"),
    ],
)
def test_the_configuration_may_lie_beside(tmp_path: Path, files: dict[str, Any], method: str):
    tensors = {"gptq": gptq(), "awq": awq_gemm(), "modelopt": fp8(blocks=False)}[method]
    found = inspected(tmp_path, tensors, None, **files)
    assert found.quantization is not None
    assert found.quantization.method == method
    assert found.quantization.problems == ()
    assert found.refusal is not None
    assert found.refusal.reason == "UNSUPPORTED_QUANTIZATION"


@pytest.mark.parametrize(
    ("config", "method", "bits"),
    [
        (
            {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3, "group_size": 64}}},
            "hqq",
            3,
        ),
        ({"quant_method": "eetq", "weights": "int8"}, "eetq", 8),
        ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "aqlm", 0),
        ({"quant_method": "quanto", "weights": "int4"}, "quanto", 0),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao", 0),
        ({"quant_method": "something-of-2031", "bits": 4}, "something-of-2031", 4),
        ({"bits": 4}, "unknown", 4),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:unknown"}, "auto-round", 4),
    ],
)
def test_others_are_named(tmp_path: Path, config: dict[str, Any], method: str, bits: int):
    found = inspected(tmp_path, kept(), config)
    assert found.quantization is not None
    assert (found.quantization.method, found.quantization.bits) == (method, bits)
    assert found.refusal is not None
    assert found.refusal.reason == "UNSUPPORTED_QUANTIZATION"
    assert method in found.refusal.message.lower()


def test_auto_round_is_what_it_packs_as(tmp_path: Path):
    found = inspected(
        tmp_path, gptq(), GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    )
    assert found.quantization is not None
    assert (found.quantization.method, found.quantization.quantized_parameters) == ("gptq", QUANTIZED)


def test_experts_in_mxfp4(tmp_path: Path):
    experts, hidden, inner = 4, 256, 512
    blocks: Tensors = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (experts, 2 * inner, hidden // 32, 16)),
        "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", (experts, 2 * inner, hidden // 32)),
        "model.embed_tokens.weight": ("BF16", (640, hidden)),
    }
    config = CONFIG | {
        "model_type": "gpt_oss",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }
    folder = write_checkpoint(tmp_path / "model", blocks, config)
    found = inspect_source(LocalSource("folder", str(folder)))
    assert found.quantization is not None
    assert found.quantization.quantized_parameters == experts * 2 * inner * hidden
    assert found.quantization.unquantized_parameters == 640 * hidden
    assert found.facts.model_type == "gpt_oss"
    assert found.facts.context_length == 4096
    assert found.refusal is not None


@pytest.mark.parametrize(("quantization", "bits"), [("int4", 4), ("mxfp4", 4)])
def test_what_treadle_made_is_described(tmp_path: Path, quantization: str, bits: int):
    tensors, config = treadles_own(quantization)
    folder = write_checkpoint(tmp_path / "model", tensors, CONFIG | {"quantization_config": config})
    found = inspect_source(LocalSource("folder", str(folder))).quantization
    assert found is not None
    assert (found.method, found.bits, found.group_size, found.problems) == (
        "compressed-tensors",
        bits,
        32,
        (),
    )
    head = CONFIG["vocab_size"] * CONFIG["hidden_size"]
    assert found.quantized_parameters == QUANTIZED + (head if quantization == "int4" else 0)
    assert found.quantized_parameters + found.unquantized_parameters == QUANTIZED + KEPT
    print(found.summary)


def test_a_description_beside_floats_is_no_quantisation(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    found = inspect_source(LocalSource("folder", str(folder)))
    assert (found.quantization, found.refusal) == (None, None)
