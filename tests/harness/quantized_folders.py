"""Checkpoints that other tools quantised, written by hand after their public documentation.

Weights are sparse: each file has its true size, and its tensors are holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_folder import TOKENIZER

from treadle.models.config import parse_config
from treadle.models.llama import expected_tensors

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape by name."""


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of these tensors, all holes."""
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + _BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any], **files: Any
) -> Path:
    """A folder of these tensors; `files` are more JSON by name, with "__" for the dot."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    write_header(folder / "model.safetensors", tensors)
    return folder


def linear_layers(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, int]]:
    """The linear layers within blocks: module to outputs and inputs."""
    expected = expected_tensors(parse_config(dict(config)))
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected.items()
        if ".layers." in name and len(shape) == 2
    }


def kept(config: Mapping[str, Any] = CONFIG, dtype: str = "F16") -> Tensors:
    """Everything but the linear layers."""
    expected = expected_tensors(parse_config(dict(config)))
    quantized = {f"{name}.weight" for name in linear_layers(config)}
    return {name: (dtype, shape) for name, shape in expected.items() if name not in quantized}


def gptq(bits: int = 4, group: int = 128, *, g_idx: bool = True) -> Tensors:
    """As GPTQModel writes them."""
    tensors = kept()
    for name, (outputs, inputs) in linear_layers().items():
        groups = -(-inputs // group) if group > 0 else 1
        tensors |= {
            f"{name}.qweight": ("I32", (inputs * bits // 32, outputs)),
            f"{name}.qzeros": ("I32", (groups, outputs * bits // 32)),
            f"{name}.scales": ("F16", (groups, outputs)),
        }
        if g_idx:
            tensors[f"{name}.g_idx"] = ("I32", (inputs,))
    return tensors


def awq_gemm(group: int = 128) -> Tensors:
    """As AutoAWQ's WQLinear_GEMM has them."""
    tensors = kept()
    for name, (outputs, inputs) in linear_layers().items():
        tensors |= {
            f"{name}.qweight": ("I32", (inputs, outputs // 8)),
            f"{name}.qzeros": ("I32", (inputs // group, outputs // 8)),
            f"{name}.scales": ("F16", (inputs // group, outputs)),
        }
    return tensors


def awq_gemv(group: int = 64, *, fast: bool = False) -> Tensors:
    """As AutoAWQ's WQLinear_GEMV and WQLinear_GEMVFast have them: groups filled up to whole words."""
    tensors = kept()
    multiple = {64: 2, 32: 4}.get(group, 1)
    for name, (outputs, inputs) in linear_layers().items():
        words = math.ceil(math.ceil(inputs // group / 8) / multiple) * multiple
        if fast:
            tensors |= {
                f"{name}.qweight": ("I16", (outputs // 4, inputs)),
                f"{name}.qzeros": ("F16", (words * 8, outputs)),
                f"{name}.scales": ("F16", (words * 8, outputs)),
            }
        else:
            tensors |= {
                f"{name}.qweight": ("I32", (outputs, inputs // 8)),
                f"{name}.qzeros": ("I32", (outputs, words)),
                f"{name}.scales": ("F16", (outputs, words * 8)),
            }
    return tensors


def compressed(form: str, strategy: str = "group", group: int = 128, bits: int = 4) -> Tensors:
    """As compressed-tensors' compressors have them."""
    tensors = kept(dtype="BF16")
    for name, (outputs, inputs) in linear_layers().items():
        scale: tuple[int, ...] = {
            "group": (outputs, -(-inputs // group)),
            "channel": (outputs, 1),
            "tensor": (1,),
            "block": (-(-outputs // 128), -(-inputs // 128)),
        }[strategy]
        if form == "pack-quantized":
            tensors |= {
                f"{name}.weight_packed": ("I32", (outputs, -(-inputs * bits // 32))),
                f"{name}.weight_scale": ("BF16", scale),
                f"{name}.weight_shape": ("I64", (2,)),
            }
        elif form == "nvfp4-pack-quantized":
            tensors |= {
                f"{name}.weight_packed": ("U8", (outputs, inputs // 2)),
                f"{name}.weight_scale": ("F8_E4M3", (outputs, inputs // 16)),
                f"{name}.weight_global_scale": ("F32", (1,)),
                f"{name}.input_global_scale": ("F32", (1,)),
            }
        elif form == "mxfp4-pack-quantized":
            tensors |= {
                f"{name}.weight_packed": ("U8", (outputs, inputs // 2)),
                f"{name}.weight_scale": ("U8", (outputs, inputs // 32)),
            }
        else:
            dtype = "I8" if form == "int-quantized" else "F8_E4M3"
            tensors |= {
                f"{name}.weight": (dtype, (outputs, inputs)),
                f"{name}.weight_scale": ("BF16", scale),
            }
    return tensors


def compressed_config(form: str, weights: Mapping[str, Any], inputs: Any = None) -> dict[str, Any]:
    """Its quantization_config, as llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
                | dict(weights),
                "input_activations": inputs,
                "output_activations": None,
            }
        },
    }


def bitsandbytes(kind: str) -> Tensors:
    """As transformers saves them: "nf4", "fp4" or "int8"."""
    tensors = kept()
    for name, (outputs, inputs) in linear_layers().items():
        if kind == "int8":
            tensors |= {
                f"{name}.weight": ("I8", (outputs, inputs)),
                f"{name}.SCB": ("F32", (outputs,)),
                f"{name}.weight_format": ("U8", ()),
            }
        else:
            count = outputs * inputs
            tensors |= {
                f"{name}.weight": ("U8", (count // 2, 1)),
                f"{name}.weight.absmax": ("F32", (count // 64,)),
                f"{name}.weight.quant_map": ("F32", (16,)),
                f"{name}.weight.quant_state.bitsandbytes__{kind}": ("U8", (90,)),
            }
    return tensors


def fp8(*, blocks: bool = True) -> Tensors:
    """As DeepSeek and Qwen have them with blocks, and others with a scale a tensor."""
    tensors = kept(dtype="BF16")
    for name, (outputs, inputs) in linear_layers().items():
        tensors[f"{name}.weight"] = ("F8_E4M3", (outputs, inputs))
        if blocks:
            shape = (-(-outputs // 128), -(-inputs // 128))
            tensors[f"{name}.weight_scale_inv"] = ("F32", shape)
        else:
            tensors[f"{name}.weight_scale"] = ("F32", ())
    return tensors


def treadles_own(quantization: str) -> tuple[Tensors, dict[str, Any]]:
    """What `treadle models quantize` makes: int4 has a minimum for each group in a zero point's place."""
    tensors = kept(dtype="BF16")
    del tensors["lm_head.weight"]
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    four = eight | {"num_bits": 4, "group_size": 32}
    groups: dict[str, Any] = {}
    head = (CONFIG["vocab_size"], CONFIG["hidden_size"])
    for name, (outputs, inputs) in linear_layers().items():
        if quantization == "int4":
            tensors |= {
                f"{name}.weight_packed": ("I32", (outputs, inputs // 8)),
                f"{name}.weight_scale": ("BF16", (outputs, inputs // 32)),
                f"{name}.weight_min": ("BF16", (outputs, inputs // 32)),
                f"{name}.weight_shape": ("I64", (2,)),
            }
        else:
            tensors |= {
                f"{name}.weight_packed": ("U8", (outputs, inputs // 2)),
                f"{name}.weight_scale": ("U8", (outputs, inputs // 32)),
            }
    if quantization == "int4":
        groups["group_0"] = {"targets": ["re:.*q_proj$"], "format": "pack-quantized"}
        groups["group_0"]["weights"] = four | {"symmetric": False}
        groups["group_1"] = {"targets": ["re:.*lm_head$"], "format": "int-quantized"}
        groups["group_1"]["weights"] = eight | {"group_size": 64}
        tensors |= {"lm_head.weight": ("I8", head), "lm_head.weight_scale": ("F32", (head[0], head[1] // 64))}
    else:
        groups["group_0"] = {"targets": ["re:.*q_proj$"], "format": "mxfp4-pack-quantized"}
        groups["group_0"]["weights"] = four | {"type": "float"}
        tensors |= {"lm_head.weight": ("BF16", head)}
    form = "mixed-precision" if quantization == "int4" else "mxfp4-pack-quantized"
    return tensors, {
        "quant_method": "compressed-tensors",
        "version": "treadle-1",
        "format": form,
        "quantization_status": "compressed",
        "ignore": [] if quantization == "int4" else ["lm_head"],
        "config_groups": groups,
    }
