"""A GGUF file's tensors under their Hugging Face names, as bfloat16 in the order of the numbers there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from treadle.errors import InvalidArgument
from treadle.models.bfloat16 import round_to_bfloat16
from treadle.models.config import ModelConfig
from treadle.models.llama import expected_tensors
from treadle_registry.formats.gguf_blocks import dequantize
from treadle_registry.formats.gguf_config import ROPE_FREQUENCIES
from treadle_registry.formats.gguf_reader import GgufFile, GgufTensor, corrupt

_T = TypeVar("_T", np.float32, np.uint16)
_OUTSIDE_LAYERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(name: str) -> str:
    """What GGUF calls the tensor that Hugging Face calls `name`."""
    stem, kind = name.rsplit(".", 1)
    if match := _LAYER.fullmatch(stem):
        return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{kind}"
    return f"{_OUTSIDE_LAYERS[stem]}.{kind}"


class GgufTensors:
    """The tensors that a configuration asks for, found and checked in a file."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        """Raises InvalidArgument: CORRUPT_GGUF for a missing tensor or wrong shape, UNSUPPORTED_TENSOR."""
        self._file, self._config = file, config
        self.shapes = expected_tensors(config)
        self._found: dict[str, GgufTensor] = {}
        for name, shape in self.shapes.items():
            tensor = file.tensors.get(gguf_name(name))
            if tensor is None:
                raise corrupt(file.path, f"it lacks the tensor {gguf_name(name)}")
            if tensor.shape != shape:
                raise corrupt(file.path, f"{tensor.name} has the shape {tensor.shape}; {shape} is due")
            self._found[name] = tensor
        unknown = file.tensors.keys() - {tensor.name for tensor in self._found.values()} - {ROPE_FREQUENCIES}
        if unknown:
            raise InvalidArgument(
                f"{file.path.name} has tensors that {config.model_type} does not: "
                + ", ".join(sorted(unknown)[:5]),
                reason="UNSUPPORTED_TENSOR",
            )

    def slices(self, name: str) -> Iterator[memoryview]:
        """The bfloat16 bytes of a tensor, in order."""
        for piece in self.pieces(name):
            yield round_to_bfloat16(piece).data.cast("B")

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor in order, as the file's blocks mean them."""
        tensor = self._found[name]
        pieces = dequantize(self._file.data(tensor), tensor.format)
        if heads := self._permuted_heads(name):
            yield unpermute(np.concatenate(list(pieces)).reshape(tensor.shape), heads)
            return
        yield from pieces

    def _permuted_heads(self, name: str) -> int:
        """How many heads' rows llama.cpp's converter reordered; 0: none."""
        if self._file.metadata["general.architecture"] != "llama":
            return 0
        if ".self_attn.q_proj." in name:
            return self._config.num_attention_heads
        return self._config.num_key_value_heads if ".self_attn.k_proj." in name else 0


def unpermute(rows: NDArray[_T], heads: int) -> NDArray[_T]:
    """Puts a query or key projection's output rows back into Hugging Face's order.

    Rotary pairs are neighbours (2i, 2i+1) in Llama-type GGUF files, and halves (i, i + head_dim/2) in
    Hugging Face's; see `permute` in llama.cpp's convert_hf_to_gguf.py, whose inverse this is.
    """
    half = rows.shape[0] // heads // 2
    paired = rows.reshape(heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
