"""Quantised checkpoints that contradict themselves, or say what cannot be: each is named, none is a crash."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantized_cases import AWQ, BNB4, DESCRIBED, GPTQ, inspected
from quantized_folders import (
    CONFIG,
    Tensors,
    awq_gemm,
    bitsandbytes,
    compressed,
    compressed_config,
    fp8,
    gptq,
    kept,
    write_checkpoint,
)

from treadle.errors import InvalidArgument, TreadleError
from treadle_registry.operations.importing import import_source
from treadle_registry.operations.job import event_to_json
from treadle_registry.sources.inspecting import inspect_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store


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
