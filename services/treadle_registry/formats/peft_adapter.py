"""A LoRA adapter in PEFT's file format: adapter_config.json and adapter_model.safetensors.

What it adds to a weight W [O, I] is scaling * B A, of rank r: A [r, I], B [O, r] (Hu et al., 2021). The
scaling is alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski, 2023). What is no plain sum is
refused by its name, and so is an entry that is not known: it might change what the tensors mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.errors import InvalidArgument
from treadle.models.config import ModelConfig
from treadle.models.llama import HEAD, expected_tensors
from treadle_registry.formats.float_tensors import Floats, StoredFloats
from treadle_registry.formats.json_files import read_json
from treadle_registry.formats.safetensors_file import StoredTensor, read_header
from treadle_registry.names import file_inside

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<part>[AB])\.weight")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_FLOATS = ("F32", "F16", "BF16")

_READ = """alpha_pattern bias init_lora_weights lora_alpha peft_type r rank_pattern target_modules
    use_rslora""".split()
_WITHOUT_EFFECT = """auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config lora_dropout megatron_core
    peft_version qalora_group_size revision runtime_config task_type""".split()
"""Of training, or of how the modules were chosen: the tensors say which. `fan_in_fan_out` is of layers that
no model here has; PEFT leaves it aside for the ones that these have."""
_MAX_ALPHA = 1e9
_MAX_RANK = 4096
"""A and B of one product are held whole."""
_INITIALISED = (True, False, None, "gaussian", "eva", "orthogonal")
"""The ways to begin that leave the model's own weights as they are."""


class PeftAdapter:
    """An adapter that fits a model."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Reads and checks everything but the values.

        Raises InvalidArgument: UNSUPPORTED_ADAPTER, CORRUPT_ADAPTER, ADAPTER_MISMATCH, CORRUPT_WEIGHTS.
        """
        raw = read_json(folder / CONFIG)
        _check_known(raw)
        header = read_header(folder / WEIGHTS)
        self._floats = StoredFloats([folder / WEIGHTS])
        self._scaling = _scalings(raw, config, header)

    @property
    def tensors(self) -> frozenset[str]:
        """The model's weights that it adds to."""
        return frozenset(self._scaling)

    def load(self, tensor: str) -> LowRank:
        """What is added to one of them; raises InvalidArgument (CORRUPT_ADAPTER) for what is not finite."""
        module = tensor.removesuffix(".weight")
        a_rI, b_Or = (
            np.concatenate(list(self._floats.pieces(f"{_PREFIX}{module}.lora_{part}.weight")))
            for part in "AB"
        )
        if not np.isfinite(a_rI).all() or not np.isfinite(b_Or).all():
            raise InvalidArgument(
                f"the adapter's tensors of {module} have values that are not finite", reason="CORRUPT_ADAPTER"
            )
        return LowRank(a_rI.astype(np.float64), b_Or.astype(np.float64), self._scaling[tensor])


class LowRank:
    """scaling * B A."""

    def __init__(self, a_rI: NDArray[np.float64], b_Or: NDArray[np.float64], scaling: float) -> None:
        self._a_rI, self._b_Or, self._scaling = a_rI, b_Or, scaling

    def rows(self, first: int, count: int) -> Floats:
        """Some of the outputs [R, I], float32.

        The product is taken in float64, so that the order in which a library adds up does not show.
        """
        delta: Floats = ((self._b_Or[first : first + count] @ self._a_rI) * self._scaling).astype(np.float32)
        return delta


def adapter_files(folder: Path) -> dict[str, Path]:
    """The two files of an adapter's folder.

    Raises InvalidArgument: PICKLE_WEIGHTS, MISSING_FILE, and PATH_OUTSIDE for a link that leaves the folder.
    """
    if not (folder / WEIGHTS).exists() and (folder / _PICKLED).exists():
        raise InvalidArgument(
            f"{folder.name} has its adapter in Python's pickle format ({_PICKLED}), which can run code and "
            f"is never read; save it as {WEIGHTS} (in PEFT: save_pretrained) where you trust it",
            reason="PICKLE_WEIGHTS",
        )
    return {name: file_inside(folder, name) for name in (CONFIG, WEIGHTS)}


def _check_known(raw: Mapping[str, Any]) -> None:
    """Refuses what would make the result another than W + scaling * B A."""
    if raw.get("peft_type") != "LORA":
        raise _unsupported(f"peft_type {raw.get('peft_type')!r:.80}; LORA is merged")
    if raw.get("bias", "none") != "none":
        raise _unsupported(f"bias {raw['bias']!r:.80}; only none is merged")
    initialised = raw.get("init_lora_weights")
    if not any(initialised is value or initialised == value for value in _INITIALISED):
        raise _unsupported(
            f"init_lora_weights {initialised!r:.80}, which changes the model's own weights: save it "
            "converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    for name, value in raw.items():
        if value and name not in _READ and name not in _WITHOUT_EFFECT:
            raise _unsupported(f"{name[:80]} {value!r:.80}")


def _scalings(
    raw: Mapping[str, Any], config: ModelConfig, header: Mapping[str, StoredTensor]
) -> dict[str, float]:
    """The scaling of each weight that is added to, by its name; every tensor has a partner and its shape."""
    pairs = _pairs(header)
    shapes = expected_tensors(config)
    scalings = {}
    for module, parts in pairs.items():
        tensor = f"{module}.weight"
        if tensor == HEAD and config.tie_word_embeddings:
            raise _unsupported("an adapter of lm_head where that is the embedding: both would change")
        shape = shapes.get(tensor, ())
        if len(shape) != 2 or module.endswith("embed_tokens"):
            raise _mismatch(
                f"it adds to {module[:100]}, which is no product of this {config.model_type} model"
            )
        rank = _pattern(raw, "rank_pattern", module, _rank(raw.get("r")))
        due = {"A": (_rank(rank), shape[1]), "B": (shape[0], _rank(rank))}
        for part, stored in parts.items():
            if stored.shape != due[part]:
                raise _mismatch(
                    f"lora_{part} of {module[:100]} has the shape {stored.shape}; the model's {shape} and "
                    f"rank {rank} ask for {due[part]}"
                )
            if stored.dtype not in _FLOATS:
                raise _corrupt(
                    f"lora_{part} of {module[:100]} is {stored.dtype}; {', '.join(_FLOATS)} are read"
                )
        alpha = _pattern(raw, "alpha_pattern", module, raw.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _MAX_ALPHA:
            raise _corrupt(f"lora_alpha of {module[:100]} must be a number; got {alpha!r:.80}")
        scalings[tensor] = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    _check_targets(raw.get("target_modules"), pairs.keys())
    return scalings


def _pairs(header: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """A and B by the module's name."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in header.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise _unsupported(
                f"the tensor {name[:100]}; lora_A.weight and lora_B.weight of products are merged"
            )
        pairs.setdefault(match["module"], {})[match["part"]] = stored
    if not pairs:
        raise _corrupt(f"{WEIGHTS} has no tensors")
    for module, parts in pairs.items():
        if len(parts) < 2:
            raise _corrupt(f"{module[:100]} has lora_{next(iter(parts))} and lacks the other")
    return pairs


def _check_targets(targets: object, modules: Collection[str]) -> None:
    """Targets that are a list of names have tensors, and all tensors are theirs; a pattern is not run."""
    if not isinstance(targets, list):
        return
    for module in modules:
        if not any(_is_of(module, target) for target in targets):
            raise _corrupt(f"it adds to {module[:100]}, which target_modules does not name")
    for target in targets:
        if not any(_is_of(module, target) for module in modules):
            raise _corrupt(f"target_modules names {target!r:.100} and {WEIGHTS} has no tensors of it")


def _is_of(module: str, target: object) -> bool:
    return isinstance(target, str) and (module == target or module.endswith(f".{target}"))


def _pattern(raw: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """The value for a module: the first entry whose name ends the module's, as PEFT takes it."""
    entries = raw.get(name) or {}
    if not isinstance(entries, Mapping):
        raise _corrupt(f"{name} must be an object")
    for key, value in entries.items():
        if not _PLAIN.fullmatch(key):
            raise _unsupported(f"{name} with the pattern {key[:80]!r}; the names of modules are read")
        if re.fullmatch(rf"(?:.*\.)?{key}", module):
            return value
    return default


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise _corrupt(f"r must be a whole number from 1 to {_MAX_RANK}; got {value!r:.80}")
    return value


def _unsupported(what: str) -> InvalidArgument:
    return InvalidArgument(f"the adapter cannot be merged: it has {what}", reason="UNSUPPORTED_ADAPTER")


def _corrupt(what: str) -> InvalidArgument:
    return InvalidArgument(f"the adapter cannot be read: {what}", reason="CORRUPT_ADAPTER")


def _mismatch(what: str) -> InvalidArgument:
    return InvalidArgument(f"the adapter is not of this model: {what}", reason="ADAPTER_MISMATCH")
