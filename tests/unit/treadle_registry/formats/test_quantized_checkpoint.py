"""Quantised checkpoints: what they are said to be, what they are refused for, and what contradicts itself."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
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
    treadles_own,
    write_checkpoint,
)

from treadle.errors import FailedPrecondition, InvalidArgument, TreadleError
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
    assert [path.name for path in store.root.rglob("*") if path.is_file()] == ["store.lock"]
    assert event_from_json(json.loads(json.dumps(event_to_json(found)))).facts == found.facts
    return found


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


def _changed(tensors: Tensors, change: Callable[[Tensors], object]) -> Tensors:
    made = dict(tensors)
    change(made)
    return made


Q = "model.layers.0.self_attn.q_proj"
CONTRADICTIONS: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "GPTQ: other bits": (gptq(4), GPTQ | {"bits": 8}, f"8 bits are configured, and {Q}.qzeros has 4"),
    "GPTQ: other groups": (gptq(4, 64), GPTQ, "4 groups of scales; 256 inputs in groups of 128 are 2"),
    "GPTQ: other rows": (
        _changed(gptq(), lambda t: t.update({f"{Q}.qweight": ("I32", (64, 256))})),
        GPTQ,
        f"{Q}.qweight has 64 rows, 512 inputs at 4 bits, and its g_idx has 256",
    ),
    "GPTQ: another layer's size": (
        _changed(
            gptq(g_idx=False),
            lambda t: t.update(
                {
                    f"{Q}.qweight": ("I32", (16, 256)),
                    f"{Q}.scales": ("F16", (1, 256)),
                    f"{Q}.qzeros": ("I32", (1, 32)),
                }
            ),
        ),
        GPTQ,
        f"{Q} has [256, 128] weights at 4 bits, and config.json means [256, 256]",
    ),
    "GPTQ: no scales": (_changed(gptq(), lambda t: t.pop(f"{Q}.scales")), GPTQ, f"{Q}.scales is no matrix"),
    "GPTQ: no zeros": (_changed(gptq(), lambda t: t.pop(f"{Q}.qzeros")), GPTQ, f"{Q}.qzeros is no matrix"),
    "GPTQ: floats": (
        _changed(gptq(), lambda t: t.update({f"{Q}.qweight": ("F16", (32, 256))})),
        GPTQ,
        f"{Q}.qweight is no matrix of 32-bit integers",
    ),
    "GPTQ: order without g_idx": (gptq(g_idx=False), GPTQ | {"desc_act": True}, "has no g_idx"),
    "GPTQ: nothing is": (kept(), GPTQ, "no tensor is quantised so"),
    "GPTQ: a layer that is none": (
        _changed(
            gptq(),
            lambda t: t.update({f"x.{k}": t[f"{Q}.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx")}),
        ),
        GPTQ,
        "x is quantised, and the architecture has no such layer",
    ),
    "AWQ that is GPTQ": (gptq(), AWQ, f"{Q}.qweight has 256 words a row"),
    "GPTQ that is AWQ": (awq_gemm(), GPTQ, f"{Q}.scales is no matrix of a scale for each of 32 outputs"),
    "AWQ: other groups": (awq_gemm(64), AWQ, "4 groups of scales; 256 inputs in groups of 128 are 2"),
    "AWQ: gemv that is gemm": (awq_gemm(), AWQ | {"version": "gemv"}, "has scales for 2 outputs"),
    "AWQ: kept and quantised": (
        awq_gemm(),
        AWQ | {"modules_to_not_convert": [Q]},
        f"{Q} is among the modules that are not quantised, and it is",
    ),
    "compressed: other bits": (
        compressed("pack-quantized"),
        compressed_config("pack-quantized", {"num_bits": 8, "group_size": 128}),
        f"{Q}.weight_packed has 32 words a row, which no group means",
    ),
    "compressed: other groups": (
        compressed("pack-quantized", group=64),
        compressed_config("pack-quantized", {"group_size": 32}),
        f"{Q}.weight_packed has 32 words a row, which no group means",
    ),
    "compressed: floats for integers": (
        compressed("float-quantized", "channel"),
        compressed_config("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        f"{Q}.weight is F8_E4M3 [256, 256], which no group means: a group has 8-bit integers",
    ),
    "compressed: a scale a channel for groups": (
        compressed("int-quantized", "channel"),
        compressed_config("int-quantized", {"num_bits": 8, "group_size": 64}),
        "its weight_scale is [256, 1] where group scales are [256, 4]",
    ),
    "compressed: no groups at all": (
        compressed("int-quantized", "channel"),
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
        "there is no group",
    ),
    "compressed: NVFP4 with MXFP4's scales": (
        compressed("mxfp4-pack-quantized"),
        compressed_config("nvfp4-pack-quantized", {"type": "float", "group_size": 16}),
        f"{Q}.weight_scale is [256, 8]; 256 inputs in groups of 16 mean [256, 16]",
    ),
    "bitsandbytes: 4 bits that are 8": (bitsandbytes("int8"), BNB4, "no tensor is quantised so"),
    "bitsandbytes: 8 bits that are floats": (
        _changed(bitsandbytes("int8"), lambda t: t.update({f"{Q}.weight": ("F16", (256, 256))})),
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        f"8 bits are configured, and {Q}.weight is F16, not I8",
    ),
    "FP8: other blocks": (
        fp8(),
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        f"{Q} has scales [2, 2]; blocks of [64, 64] of [256, 256] are [4, 4]",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(tmp_path: Path, case: str):
    tensors, config, named = CONTRADICTIONS[case]
    found = inspected(tmp_path, tensors, config)
    assert found.quantization is not None, "it is described all the same"
    assert isinstance(found.refusal, InvalidArgument)
    assert found.refusal.reason == "CORRUPT_QUANTIZATION"
    assert named in found.refusal.message
    assert len(found.refusal.message) < 2000
    print(found.refusal.message)


CORRUPT: dict[str, tuple[Any, str]] = {
    "bits in words": (GPTQ | {"bits": "four"}, "bits must be a whole number"),
    "no bits": ({"quant_method": "gptq"}, "bits must say"),
    "zero bits": (GPTQ | {"bits": 0}, "bits"),
    "bits past all": (GPTQ | {"bits": 10**30}, "bits"),
    "bits that are true": (GPTQ | {"bits": True}, "bits"),
    "groups of a list": (AWQ | {"group_size": [128]}, "group_size"),
    "3 bits a word": (AWQ | {"bits": 3}, "bits must divide"),
    "a flag of words": (GPTQ | {"desc_act": "yes"}, "desc_act must be true or false"),
    "a list": ([1, 2], "quantization_config must be an object"),
    "a word": ("gptq", "quantization_config must be an object"),
    "a method of lists": ({"quant_method": ["gptq"]}, "quant_method must be a word"),
    "a long method": ({"quant_method": "x" * 100_000}, "quant_method must be a word"),
    "modules of numbers": (AWQ | {"modules_to_not_convert": [1]}, "must list modules"),
    "groups that are a list": (
        compressed_config("x", {}) | {"config_groups": [1]},
        "config_groups must be an object",
    ),
    "a group that is a number": (
        compressed_config("x", {}) | {"config_groups": {"a": 1}},
        "a must be an object",
    ),
    "a thousand groups": (
        compressed_config("x", {}) | {"config_groups": {str(n): {} for n in range(1000)}},
        "at most 256 groups",
    ),
    "blocks of nothing": (
        compressed_config("x", {"block_structure": [0, 128]}),
        "block_structure must be two sizes",
    ),
    "FP8 blocks of words": ({"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_configurations_that_cannot_be(tmp_path: Path, case: str):
    quantization, named = CORRUPT[case]
    config = CONFIG | {"quantization_config": quantization}
    source = LocalSource("folder", str(write_checkpoint(tmp_path / "model", gptq(), config)))
    for look in (inspect_source, lambda source: import_source(Store.open(tmp_path / "store"), source)):
        with pytest.raises(InvalidArgument) as caught:
            look(source)
        assert caught.value.reason == "CORRUPT_CONFIG"
        assert named in caught.value.message
        assert len(caught.value.message) < 500


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
    tensors = {"gptq": gptq(), "awq": awq_gemm(), "modelopt": kept()}[method]
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


def test_nothing_that_a_stranger_writes_is_a_crash(tmp_path: Path, rng: random.Random):
    """Whatever the shapes and the words are: an answer, or an error of the suite's own."""
    words: list[Any] = [0, -1, 1, 3, 4, 8, 128, "", "x", None, True, [], {}, [0, 0], [128, 128], 1e9]
    counts = {"described": 0, "refused": 0}
    for case in range(400):
        tensors, config, _ = rng.choice(list(DESCRIBED.values()))
        made, said = dict(tensors), json.loads(json.dumps(config))
        for _ in range(rng.randint(0, 3)):
            name = rng.choice(list(made))
            dtype, shape = made[name]
            sizes = [rng.choice((0, 1, 2, 7, 256, size)) for size in shape[: rng.randint(0, 3)]]
            made[name] = (rng.choice((dtype, "I32", "U8", "F16")), tuple(sizes))
        for _ in range(rng.randint(0, 2)):
            holder = said
            while rng.random() < 0.6 and (inner := [v for v in holder.values() if isinstance(v, dict) and v]):
                holder = rng.choice(inner)
            holder[rng.choice(list(holder))] = rng.choice(words)
        folder = write_checkpoint(tmp_path / str(case), made, CONFIG | {"quantization_config": said})
        try:
            found = inspect_source(LocalSource("folder", str(folder)))
        except TreadleError:
            counts["refused"] += 1
            continue
        counts["described"] += 1
        assert found.refusal is not None
        assert len(json.dumps(event_to_json(found))) < 100_000
    assert min(counts.values()) > 20
    print(counts)
