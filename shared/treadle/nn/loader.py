"""Weights straight from safetensors, by memory map: pages are read when a layer first needs them."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from treadle.errors import DataLoss, FailedPrecondition
from treadle.models import llama as llama_tensors
from treadle.models.config import ModelConfig, read_config
from treadle.models.encoder_tensors import WORDS
from treadle.models.families import is_encoder, optional_tensors, read_any_config
from treadle.models.stored_weights import StoredLayout, stored_tensors
from treadle.nn import llama
from treadle.nn.encoder_model import EncoderModel
from treadle.nn.encoder_model import build as build_encoder
from treadle.nn.encoder_weights import take
from treadle.nn.execution import Kernels, Quantization, check_quantization, prepare, prepare_encoder
from treadle.nn.stored_weights import take_quantized

BUILDERS: Mapping[str, Callable[[ModelConfig], llama.LlamaForCausalLM]] = {
    "llama": llama.build,
    "mistral": llama.build,
    "qwen2": llama.build,
    "qwen3": llama.build,
}
"""The decoders by `model_type`; the encoders' table is `encoder_model.ENCODERS`."""

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
    tied = llama_tensors.tied_tensors(config)
    state = _read_all(folder, stored_tensors(config), tied, dtype, device)
    quantized = take_quantized(state, config, dtype, device)
    state |= {name: state[source] for name, source in tied.items()}
    _merge(state)
    lacking, _ = model.load_state_dict(state, strict=False, assign=True)
    assert set(lacking) == {f"{name}.weight" for name in quantized}
    model.requires_grad_(False)
    del state
    if prepare(model, quantization=quantization, kernels=kernels, quantized=quantized):
        _map_anew(model.model.embed_tokens, llama_tensors.EMBEDDING, folder, dtype)
        _trim_heap()
    return model


def load_encoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: Quantization = "",
    kernels: Kernels = "auto",
) -> EncoderModel:
    """The encoder of a canonical folder, in `dtype` on `device`, with its kernels chosen (`nn.execution`).

    A bare encoder's pooler is not kept: nothing here needs it. Raises InvalidArgument or FailedPrecondition
    for the configuration and for a quantisation that encoders do not have, and DataLoss as `load_model`.
    """
    config = read_any_config(folder)
    if not is_encoder(config):
        raise FailedPrecondition(
            f"{config.model_type} is a decoder; load_encoder takes encoders", reason="NOT_AN_ENCODER"
        )
    if quantization == "int4":
        raise FailedPrecondition(
            "encoders are served as they are or as int8: set TREADLE_ENGINE_QUANTIZATION to int8, or leave "
            "it empty",
            reason="QUANTIZATION_NOT_AVAILABLE",
        )
    check_quantization(quantization, config.quantization, device)
    model = build_encoder(config)
    optional = {name: StoredLayout(shape) for name, shape in optional_tensors(config).items()}
    state = _read_all(folder, stored_tensors(config), {}, dtype, device, optional)
    model.load_state_dict(take(state, model), assign=True)
    model.requires_grad_(False)
    if prepare_encoder(model, quantization=quantization, kernels=kernels):
        _map_anew(model.embeddings.words, WORDS, folder, dtype)
        _trim_heap()
    return model


def _map_anew(embedding: llama.Embedding, name: str, folder: Path, dtype: torch.dtype) -> None:
    """The embedding is all that is still read from the files: a map of its own lets go of the other pages."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt", device="cpu") as file:
            if name in file.keys():  # noqa: SIM118 - no mapping
                weight = file.get_tensor(name).to(dtype)
                embedding.weight = nn.Parameter(weight, requires_grad=False)
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


def _read_all(
    folder: Path,
    expected: Mapping[str, StoredLayout],
    tied: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    optional: Mapping[str, StoredLayout] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Every expected tensor of a folder, floats as `dtype`; tied and optional ones are passed over."""
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors = _read(path, {**expected, **optional}, tied, dtype, device)
        if twice := sorted(tensors.keys() & state.keys()):
            raise DataLoss(
                f"{path.name} repeats {len(twice)} tensors, {_some(twice)}", reason="REPEATED_TENSORS"
            )
        state |= tensors
    if missing := sorted(expected.keys() - state.keys()):
        raise DataLoss(
            f"{folder.name} lacks {len(missing)} tensors, {_some(missing)}", reason="MISSING_TENSORS"
        )
    return {name: tensor for name, tensor in state.items() if name not in optional}


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
