"""What a model is, from its configuration and the headers of its weights; also one that cannot be served."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from treadle.errors import TreadleError
from treadle.models.config_values import MAX_CONFIG_BYTES
from treadle.models.element_sizes import GGUF_BLOCKS
from treadle.models.families import parse_any_config
from treadle_registry.formats.canonical import facts_of_config
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.formats.huggingface_folder import (
    has_chat_template,
    license_of,
    own_quantization,
    quantization_of,
)
from treadle_registry.formats.json_files import read_json
from treadle_registry.formats.quantized_checkpoint import QuantizedCheckpoint, without_quantization
from treadle_registry.formats.safetensors_file import StoredTensor, dtype_shares, read_header
from treadle_registry.store.manifest import ModelFacts
from treadle_registry.store.task_facts import TaskFacts

_MAX_WORD = 100
_MAX_NUMBER = 1 << 31
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
"""What configurations of other architectures call it; so with the following."""
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_VOCABULARY = ("vocab_size", "padded_vocab_size", "n_vocab")
_GGUF_FLOATS = ("F32", "F16", "BF16", "F64")
_DERIVED = re.compile(r".*rotary_emb\.inv_freq|rope_freqs\.weight")
"""Tables that follow from the configuration: no parameters."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model is. `refusal` says why it cannot be imported, as an import would; None: it can."""

    facts: ModelFacts
    format: Literal["safetensors", "gguf"]
    files: tuple[tuple[str, int], ...]
    """Names and bytes of what an import would take."""
    quantization: QuantizedCheckpoint | None = None
    refusal: TreadleError | None = None
    task_facts: TaskFacts | None = None
    """What can be asked of it; None where it cannot be imported."""

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)


def inspect_safetensors(
    files: Mapping[str, Path], weights: Sequence[str], sizes: Mapping[str, int]
) -> Inspection:
    """Of a Hugging Face folder whose files lie wherever they lie; `weights` are its safetensors files.

    Of those only the headers are read. `sizes` are the files' true ones. Raises InvalidArgument
    (CORRUPT_CONFIG, CORRUPT_WEIGHTS, MISSING_FILE) where nothing can be said.
    """
    config = read_json(files["config.json"], MAX_CONFIG_BYTES)
    tensors: dict[str, StoredTensor] = {}
    for name in weights:
        if name in files:
            tensors |= read_header(files[name])
    quantization = quantization_of(config, files, tensors)
    if quantization is None:
        parameters = _parameters(config, tensors)
    else:
        parameters = quantization.quantized_parameters + quantization.unquantized_parameters
    own = own_quantization(config)
    if own and quantization:
        # Under compressed-tensors' words lie other numbers.
        quantization = replace(quantization, summary=f"{own}, as treadle models quantize stores it")
    facts = replace(
        _facts(config, parameters),
        quantization=own,
        dtypes=dtype_shares(tensors),
        license=license_of(files),
        has_chat_template=has_chat_template(files),
    )
    return Inspection(facts, "safetensors", tuple(sorted(sizes.items())), quantization)


def inspect_gguf(path: Path, name: str, size: int) -> Inspection:
    """Of a GGUF file; raises InvalidArgument (CORRUPT_GGUF) where it is none."""
    with GgufFile(path, only_converted=False) as file:
        return Inspection(_gguf_facts(file), "gguf", ((name, size),), _gguf_quantization(file))


def _facts(config: Mapping[str, Any], parameters: int) -> ModelFacts:
    """As an import counts them where it knows the architecture."""
    known = without_quantization(config)
    with contextlib.suppress(TreadleError):
        return facts_of_config(known, parse_any_config(known))
    text = config.get("text_config")
    holders = [config, *([text] if isinstance(text, Mapping) else [])]
    classes = config.get("architectures")
    return ModelFacts(
        model_type=_word(config.get("model_type")),
        architecture=_word(classes[0]) if isinstance(classes, list) and classes else "",
        parameters=parameters,
        vocab_size=_first(holders, _VOCABULARY),
        context_length=_first(holders, _CONTEXT),
        hidden_size=_first(holders, _HIDDEN),
        num_layers=_first(holders, _LAYERS),
    )


def _parameters(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> int:
    """Elements of all tensors; a head that is the embedding does not count again."""
    is_tied = config.get("tie_word_embeddings") is True
    return sum(
        tensor.elements
        for name, tensor in tensors.items()
        if not _DERIVED.fullmatch(name) and not (is_tied and name == "lm_head.weight")
    )


def _gguf_facts(file: GgufFile) -> ModelFacts:
    metadata = file.metadata
    name = _word(metadata.get("general.architecture"))
    tokens, embedding = metadata.get("tokenizer.ggml.tokens"), file.tensors.get("token_embd.weight")
    vocabulary = _first([metadata], (f"{name}.vocab_size",))
    if embedding is not None and len(embedding.shape) == 2:
        vocabulary = min(embedding.shape[0], _MAX_NUMBER)
    elif isinstance(tokens, list):
        vocabulary = len(tokens)
    parameters = sum(
        tensor.elements for tensor_name, tensor in file.tensors.items() if not _DERIVED.fullmatch(tensor_name)
    )
    return ModelFacts(
        model_type=name,
        architecture=name,
        parameters=parameters,
        vocab_size=vocabulary,
        context_length=_first([metadata], (f"{name}.context_length",)),
        hidden_size=_first([metadata], (f"{name}.embedding_length",)),
        num_layers=_first([metadata], (f"{name}.block_count",)),
        license=_word(metadata.get("general.license")),
        has_chat_template=bool(metadata.get("tokenizer.chat_template")),
        dtypes=file.dtype_shares(),
    )


def _gguf_quantization(file: GgufFile) -> QuantizedCheckpoint | None:
    """By the format that most parameters have; a file of floats is not quantised."""
    shares = [share for share in file.dtype_shares() if share.dtype not in _GGUF_FLOATS]
    if not shares:
        return None
    main = shares[0].dtype
    quantized = sum(share.parameters for share in shares)
    kept = sum(share.parameters for share in file.dtype_shares()) - quantized
    digits = re.search(r"\d+", main)
    mixed = ", ".join(share.dtype for share in shares)
    return QuantizedCheckpoint(
        method="gguf",
        format=main,
        bits=int(digits[0]) if digits else 0,
        group_size=GGUF_BLOCKS[main][0],
        strategy="group",
        symmetric=main.endswith("_0") or main in ("Q3_K", "Q6_K"),
        activation_order=False,
        activation_bits=0,
        ignored_modules=(),
        quantized_parameters=quantized,
        unquantized_parameters=kept,
        summary=f"GGUF in {mixed}; becomes bfloat16 when it is imported",
        because="",
    )


def _first(holders: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    """The first number under one of the keys; 0 where there is none."""
    for holder in holders:
        for key in keys:
            value = holder.get(key)
            if type(value) is int and 0 < value < _MAX_NUMBER:
                return value
    return 0


def _word(value: object) -> str:
    return value[:_MAX_WORD] if isinstance(value, str) else ""
