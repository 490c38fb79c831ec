"""Weights straight from safetensors, by memory map: pages are read when a layer first needs them."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from treadle.errors import DataLoss, FailedPrecondition
from treadle.models import llama as llama_tensors
from treadle.models.config import ModelConfig, read_config
from treadle.models.stored_weights import StoredLayout, stored_tensors
from treadle.nn import llama
from treadle.nn.execution import Kernels, Quantization, check_quantization, prepare
from treadle.nn.stored_weights import take_quantized

BUILDERS: Mapping[str, Callable[[ModelConfig], llama.LlamaForCausalLM]] = {
    "llama": llama.build,
    "mistral": llama.build,
    "qwen2": llama.build,
    "qwen3": llama.build,
}
"""The architecture of each `model_type`."""

INDEX = "model.safetensors.index.json"
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_TYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
}


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: Quantization = "",
    kernels: Kernels = "auto",
) -> llama.LlamaForCausalLM:
    """The model of a canonical folder, in `dtype` on `device`, with its kernels chosen (`nn.execution`).

    Weights that are stored quantised are taken as they are; MXFP4 becomes `dtype`. Raises InvalidArgument or
    FailedPrecondition for the configuration and for another quantisation than the stored one, and DataLoss
    for files that are missing, damaged, or hold other tensors than it asks for; the message names them.
    """
    config = read_config(folder)
    check_quantization(quantization, config.quantization, device)
    model = BUILDERS[config.model_type](config)
    expected, tied = stored_tensors(config), llama_tensors.tied_tensors(config)
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors = _read(path, expected, tied, dtype, device)
        if twice := sorted(tensors.keys() & state.keys()):
            raise DataLoss(
                f"{path.name} repeats {len(twice)} tensors, {_some(twice)}", reason="REPEATED_TENSORS"
            )
        state |= tensors
    if missing := sorted(expected.keys() - state.keys()):
        raise DataLoss(
            f"{folder.name} lacks {len(missing)} tensors, {_some(missing)}", reason="MISSING_TENSORS"
        )
    quantized = take_quantized(state, config, dtype, device)
    state |= {name: state[source] for name, source in tied.items()}
    _merge(state)
    lacking, _ = model.load_state_dict(state, strict=False, assign=True)
    assert set(lacking) == {f"{name}.weight" for name in quantized}
    model.requires_grad_(False)
    del state
    if prepare(model, quantization=quantization, kernels=kernels, quantized=quantized):
        _map_embedding_anew(model, folder, dtype)
        _trim_heap()
    return model


def _map_embedding_anew(model: llama.LlamaForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """The embedding is all that is still read from the files: a map of its own lets go of the other pages."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt", device="cpu") as file:
            if llama_tensors.EMBEDDING in file.keys():  # noqa: SIM118 - no mapping
                weight = file.get_tensor(llama_tensors.EMBEDDING).to(dtype)
                model.model.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)
                return


def _trim_heap() -> None:
    """Gives what the weights took on their way back to the system, where the C library can be told."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _merge(state: dict[str, torch.Tensor]) -> None:
    """Puts what is multiplied at once into one tensor each."""
    for merged, parts in llama.MERGED.items():
        first = parts[0]
        for name in [name for name in state if f".{first}." in name]:
            rows = [state.pop(name.replace(first, part)) for part in parts]
            state[name.replace(first, merged)] = torch.cat(rows)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: the shards that its index names, or the single file."""
    index = folder / INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataLoss(f"{INDEX} has no usable weight_map: {error}", reason="CORRUPT_INDEX") from error
    for name in names:
        if not _is_plain_name(name):
            raise FailedPrecondition(
                f"{INDEX} names {name!r}, which is no file of the folder", reason="CORRUPT_INDEX"
            )
    return [folder / name for name in names]


def _is_plain_name(name: object) -> bool:
    """A file of the folder itself: no separator of any system, no drive, no step up."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    return name.endswith(".safetensors") and not any(mark in name for mark in "/\\:")


def _read(
    path: Path,
    expected: Mapping[str, StoredLayout],
    tied: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    state = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in tied or name.endswith("rotary_emb.inv_freq"):
                    continue
                tensor = file.get_tensor(name)
                layout = expected.get(name)
                if layout is None:
                    raise DataLoss(f"{path.name} has an unexpected tensor {name}", reason="UNEXPECTED_TENSOR")
                if tuple(tensor.shape) != layout.shape:
                    raise DataLoss(
                        f"{path.name}: {name} is {list(tensor.shape)}; "
                        f"config.json asks for {list(layout.shape)}",
                        reason="TENSOR_SHAPE",
                    )
                types = (_TYPES[layout.dtype],) if layout.dtype else FLOAT_TYPES
                if tensor.dtype not in types:
                    raise DataLoss(
                        f"{path.name}: {name} is {tensor.dtype}; "
                        + ("config.json asks for " if layout.dtype else "supported are ")
                        + ", ".join(str(each).removeprefix("torch.") for each in types),
                        reason="TENSOR_TYPE",
                    )
                state[name] = tensor if layout.dtype else tensor.to(device=device, dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise DataLoss(f"{path.name} cannot be read: {error}", reason="CORRUPT_WEIGHTS") from error
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
