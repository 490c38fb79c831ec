"""Whether a checkpoint's tensors are those that its configuration asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from treadle.errors import InvalidArgument
from treadle.models.config import ModelConfig
from treadle.models.llama import tied_tensors
from treadle.models.stored_weights import stored_tensors
from treadle_registry.formats.safetensors_file import StoredTensor

FLOATS = ("F32", "F16", "BF16")
# Old checkpoints keep a table that follows from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the configuration, so that nobody needs it."""
    return _DERIVED.fullmatch(name) is not None


def check_tensors(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Exactly the tensors that the configuration asks for, each of its shape and type.

    Raises InvalidArgument: CORRUPT_WEIGHTS, UNSUPPORTED_TENSOR, UNSUPPORTED_DTYPE.
    """
    expected = stored_tensors(config)
    tied = tied_tensors(config).keys()
    own = {name: tensor for name, tensor in tensors.items() if name not in tied and not is_derived(name)}
    check_shapes(config.model_type, {name: layout.shape for name, layout in expected.items()}, own)
    for name, tensor in tensors.items():
        due = expected[name].dtype if name in expected else ""
        if tensor.dtype not in ((due,) if due else FLOATS) and not is_derived(name):
            wanted = f"config.json means {due}" if due else f"{', '.join(FLOATS)} are converted"
            raise InvalidArgument(f"{name[:100]} is {tensor.dtype}; {wanted}", reason="UNSUPPORTED_DTYPE")


def check_shapes(
    model_type: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor]
) -> None:
    """Exactly the tensors that are expected, each of its shape.

    Raises InvalidArgument: CORRUPT_WEIGHTS, UNSUPPORTED_TENSOR.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise InvalidArgument(
                f"the weights lack the tensor {name}; take all of the model's files", reason="CORRUPT_WEIGHTS"
            )
        if tensors[name].shape != shape:
            raise InvalidArgument(
                f"{name} has the shape {tensors[name].shape}; config.json means {shape}; "
                "take both from one model",
                reason="CORRUPT_WEIGHTS",
            )
    if unknown := tensors.keys() - expected.keys():
        raise InvalidArgument(
            f"the weights have tensors that {model_type} does not: "
            + ", ".join(name[:100] for name in sorted(unknown)[:5]),
            reason="UNSUPPORTED_TENSOR",
        )
