"""A Hugging Face folder as a model to import."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from treadle.errors import FailedPrecondition, InvalidArgument, TreadleError
from treadle.models.bfloat16 import round_to_bfloat16
from treadle.models.config_values import MAX_CONFIG_BYTES
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import AnyConfig, parse_any_config
from treadle.models.llama import EMBEDDING, HEAD, expected_tensors
from treadle.text.tokenizer import backend_from_bytes
from treadle.transfer.file_names import is_file_name, is_inner_folder, is_inner_name
from treadle_registry.formats.canonical import WEIGHTS, TextParts
from treadle_registry.formats.encoder_weights import canonical_tensors, stage_encoder
from treadle_registry.formats.json_files import json_bytes, read_json
from treadle_registry.formats.quantized_checkpoint import (
    QUANTIZATION_FILES,
    QuantizedCheckpoint,
    describe,
    find_quantization,
    refusal,
    without_quantization,
)
from treadle_registry.formats.safetensors_file import (
    StoredTensor,
    TensorDigests,
    dtype_shares,
    read_header,
    tensor_pieces,
    write_bfloat16,
)
from treadle_registry.formats.sentence_transformers import lower_cased
from treadle_registry.formats.shared_weights import share_weights
from treadle_registry.formats.task_facts import read_encoder
from treadle_registry.formats.tensor_checks import FLOATS, check_tensors, is_derived
from treadle_registry.formats.tokenizers import files as tokenizer_files
from treadle_registry.formats.tokenizers.rebuilt import rebuild
from treadle_registry.names import check_file_name, file_inside
from treadle_registry.operations.progress import Report, Stage, StageMeter
from treadle_registry.store.staging import Staging

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KEPT_SUFFIXES = (".json", ".txt", ".md", ".jinja", ".model", ".bpe")
_MAX_TEXT = 256 << 20
_MAX_TOKENIZER = 128 << 20
_MAX_INDEX = 16 << 20
MAX_FILES = 1024
_TEMPLATES, _TEMPLATE_SUFFIX = "additional_chat_templates", ".jinja"
_LICENSE = re.compile(r"^license:\s*['\"]?([A-Za-z0-9][A-Za-z0-9._-]{0,99})", re.MULTILINE)


class HuggingFaceFolder:
    """config.json, safetensors in one file or several, the tokenizer and what else belongs to them.

    A decoder's weights become bfloat16, rounded to nearest even; files of bfloat16 alone, and of what this
    suite has quantised, are taken as they are. An encoder's keep their types; see `encoder_weights`.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the files; raises InvalidArgument (MISSING_FILE, PICKLE_WEIGHTS, PATH_OUTSIDE) and
        FailedPrecondition (UNSUPPORTED_TOKENIZER)."""
        weights = weight_files(folder)
        names = sorted({"config.json", *kept_names(folder), *weights})
        files = {name: file_inside(folder, name) for name in names}
        tokenizer_files.check_there(files)
        self._take(files | inner_files(folder), weights)

    @classmethod
    def of_files(cls, files: Mapping[str, Path], weights: Sequence[str]) -> HuggingFaceFolder:
        """A model whose files lie wherever they lie; `weights` are the names of its safetensors files."""
        made = cls.__new__(cls)
        made._take(dict(files), tuple(weights))
        return made

    def _take(self, files: dict[str, Path], weights: tuple[str, ...]) -> None:
        self._weights = weights
        self.files = files
        """What is kept as it came: name in `source/` and where it lies."""
        if len(self.files) > MAX_FILES:
            raise InvalidArgument(
                f"the model has {len(self.files)} files; at most {MAX_FILES} are taken",
                reason="TOO_MANY_FILES",
            )
        for name, path in self.files.items():
            if name not in self._weights and path.stat().st_size > _MAX_TEXT:
                raise InvalidArgument(f"{name} is larger than {_MAX_TEXT} bytes", reason="FILE_TOO_LARGE")

    def check(self) -> TextParts:
        """Everything but the weights' values, from where the files lie; raises what is wrong with them."""
        return self._read(self.files)[0]

    def stage(
        self, staging: Staging, report: Report, *, as_stored: bool = False
    ) -> tuple[TextParts, TensorDigests]:
        """Writes the canonical weights from the copies in `staging`.

        `as_stored`: they are some artifact's canonical weights already, of whatever type.
        """
        parts, places = self._read({name: staging.path(f"source/{name}") for name in self.files})
        config = parse_any_config(dict(parts.config))
        if isinstance(config, EncoderConfig):
            return parts, stage_encoder(staging, config, places, self._weights, report)
        canonical = all(
            tensor.dtype == "BF16" and not is_derived(name) for name, (_, tensor) in places.items()
        )
        if as_stored or canonical or config.quantization:
            return parts, share_weights(staging, self._weights, report)
        shapes = {name: tensor.shape for name, (_, tensor) in sorted(places.items()) if not is_derived(name)}
        meter = StageMeter(report, Stage.CONVERTING, sum(2 * places[name][1].elements for name in shapes))

        def slices(name: str) -> Iterator[memoryview]:
            for piece in _bfloat16_slices(*places[name]):
                yield piece
                meter.add(piece.nbytes)

        with staging.create(WEIGHTS) as write:
            return parts, write_bfloat16(write, shapes, slices)

    def _read(self, files: Mapping[str, Path]) -> tuple[TextParts, dict[str, tuple[Path, StoredTensor]]]:
        config = check_config(files)
        places: dict[str, tuple[Path, StoredTensor]] = {}
        for file in self._weights:
            tensors = read_header(files[file])
            if twice := places.keys() & tensors.keys():
                raise InvalidArgument(
                    f"{min(twice)[:100]} is in {file} and in another file too; take the model's own "
                    "files, and no older ones beside them",
                    reason="CORRUPT_WEIGHTS",
                )
            places |= {name: (files[file], tensor) for name, tensor in tensors.items()}
        stored = {name: tensor for name, (_, tensor) in places.items()}
        if not own_quantization(config) and (quantized := quantization_of(config, files, stored)):
            raise refusal(quantized, is_encoder=_is_of_encoder(config))
        model = parse_any_config(config)
        if isinstance(model, EncoderConfig):
            canonical_tensors(model, stored)
        else:
            check_tensors(model, stored)
        return replace(_text_parts(files, config, model), dtypes=dtype_shares(stored)), places


def own_quantization(config: Mapping[str, Any]) -> str:
    """How the weights are quantised where it is this suite that stores them so; else ""."""
    with contextlib.suppress(TreadleError):
        return parse_any_config(dict(config)).quantization
    return ""


def _is_of_encoder(config: Mapping[str, Any]) -> bool:
    """Whether it would be an encoder if it were not quantised."""
    with contextlib.suppress(TreadleError):
        return isinstance(parse_any_config(without_quantization(config)), EncoderConfig)
    return False


def check_config(files: Mapping[str, Path]) -> dict[str, Any]:
    """config.json, of a model that needs no code of its own; raises FailedPrecondition (REMOTE_CODE), and
    InvalidArgument (CORRUPT_CONFIG)."""
    config = read_json(files["config.json"], MAX_CONFIG_BYTES)
    for name in ("config.json", "tokenizer_config.json"):
        if name in files and read_json(files[name]).get("auto_map"):
            raise FailedPrecondition(
                f"{name} asks for code of the model's own (auto_map), which is never run; remove the "
                "entry where the model is of a supported type without it",
                reason="REMOTE_CODE",
            )
    return config


def quantization_of(
    config: Mapping[str, Any], files: Mapping[str, Path], tensors: Mapping[str, StoredTensor]
) -> QuantizedCheckpoint | None:
    """How somebody quantised the weights; None where nobody says that they are.

    Raises InvalidArgument (CORRUPT_CONFIG).
    """
    beside = {name: read_json(files[name]) for name in QUANTIZATION_FILES if name in files}
    found = find_quantization(config, beside)
    is_beside = found is not None and found.where in beside
    # Such a file may have been left behind.
    if found is None or (is_beside and all(tensor.dtype in FLOATS for tensor in tensors.values())):
        return None
    expected = None
    with contextlib.suppress(TreadleError):
        model = parse_any_config(without_quantization(config))
        if not isinstance(model, EncoderConfig):
            # A quantised head is a tensor of its own also where it is tied.
            expected = {HEAD: expected_tensors(model)[EMBEDDING]} | expected_tensors(model)
    return describe(found, tensors, expected)


def kept_names(folder: Path) -> set[str]:
    """What is kept of a folder beside its weights: texts and licences."""
    return {
        path.name
        for path in folder.iterdir()
        if is_file_name(path.name)
        and (path.name.endswith(_KEPT_SUFFIXES) or path.name.upper().startswith("LICENSE"))
    }


def inner_files(folder: Path) -> dict[str, Path]:
    """What is kept of a folder's own folders, as `is_inner_name` says: templates, modules' settings."""
    found: dict[str, Path] = {}
    for inner in sorted(path for path in folder.iterdir() if is_inner_folder(path.name) and path.is_dir()):
        names = [name for path in inner.iterdir() if is_inner_name(name := f"{inner.name}/{path.name}")]
        if names and inner.resolve().parent != folder.resolve():
            raise InvalidArgument(
                f"{inner.name} is a link that leaves its folder; import a copy without links (cp -rL)",
                reason="PATH_OUTSIDE",
            )
        for name in sorted(names)[: MAX_FILES + 1]:
            found[name] = file_inside(inner, name.partition("/")[2])
    return found


def named_shards(index: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The files that an index called `name` maps tensors to.

    Raises InvalidArgument (CORRUPT_WEIGHTS, PATH_OUTSIDE).
    """
    mapped = index.get("weight_map")
    files = list(mapped.values()) if isinstance(mapped, dict) else []
    if not files or not all(isinstance(file, str) and file.endswith(".safetensors") for file in files):
        raise InvalidArgument(
            f"{name} has no weight_map to safetensors files; convert the model to safetensors, or take its "
            "own index",
            reason="CORRUPT_WEIGHTS",
        )
    return tuple(sorted(check_file_name(file, name) for file in set(files)))


def weight_files(folder: Path) -> tuple[str, ...]:
    """The safetensors files, and the index where there is one, of a folder."""
    if (folder / _INDEX).exists():
        return named_shards(read_json(file_inside(folder, _INDEX), _MAX_INDEX), _INDEX)
    single = sorted(path.name for path in folder.glob("*.safetensors"))
    if _SINGLE in single:
        return (_SINGLE,)
    if len(single) == 1:
        return (single[0],)
    if any(path.name.endswith(PICKLE_SUFFIXES) for path in folder.iterdir()):
        raise InvalidArgument(
            f"{folder.name} has its weights in Python's pickle format, which can run code and is never read; "
            "convert them to safetensors (in transformers: load and save_pretrained) where you trust them",
            reason="PICKLE_WEIGHTS",
        )
    raise InvalidArgument(
        f"{folder.name} has neither {_SINGLE} nor {_INDEX}; take the model's own", reason="MISSING_FILE"
    )


def _text_parts(files: Mapping[str, Path], config: Mapping[str, Any], model: AnyConfig) -> TextParts:
    tokenizer_config = _optional(files, "tokenizer_config.json")
    if rebuilt := rebuild(files, tokenizer_config, config, read_json):
        tokenizer, text = dict(rebuilt.tokenizer), rebuilt.tokenizer_json
        tokenizer_config = dict(rebuilt.config)
    else:
        tokenizer = read_json(files["tokenizer.json"], _MAX_TOKENIZER)
        text = files["tokenizer.json"].read_bytes()
    try:
        backend_from_bytes(text)
    except ValueError as error:
        raise InvalidArgument(
            f"tokenizer.json cannot be loaded: {error}", reason="CORRUPT_TOKENIZER"
        ) from error
    came = dict(tokenizer)
    if tokenizer.get("padding") is not None or tokenizer.get("truncation") is not None:
        # These belong to a call; baked in, they would cut or fill every prompt.
        tokenizer |= {"padding": None, "truncation": None}
    task_facts = None
    if isinstance(model, EncoderConfig):
        said, task_facts = read_encoder(files, config, model, tokenizer_config)
        if said.lower_case:
            tokenizer["normalizer"] = lower_cased(tokenizer.get("normalizer"))
    if tokenizer != came:
        text = json_bytes(tokenizer)
    templates = _chat_templates(files, tokenizer_config.pop("chat_template", None))
    generation = _optional(files, "generation_config.json")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in generation and config.get(key) is not None:
            generation[key] = config[key]
    return TextParts(
        config=config,
        tokenizer_json=text,
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
        chat_templates=templates,
        generation=generation,
        license=license_of(files),
        task_facts=task_facts,
    )


def _optional(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json(files[name]) if name in files else {}


def _chat_templates(files: Mapping[str, Path], embedded: object) -> dict[str, str]:
    """Templates by name; a file of its own wins over what tokenizer_config.json has."""
    templates: dict[str, str] = {}
    if isinstance(embedded, str):
        templates["default"] = embedded
    elif isinstance(embedded, list):
        for entry in embedded:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                templates[str(entry.get("name"))] = entry["template"]
    older = _optional(files, "chat_template.json").get("chat_template")
    if isinstance(older, str):
        templates["default"] = older
    if "chat_template.jinja" in files:
        templates["default"] = _template(files, "chat_template.jinja")
    for name in files:
        if name.startswith(f"{_TEMPLATES}/"):
            own = name.removeprefix(f"{_TEMPLATES}/").removesuffix(_TEMPLATE_SUFFIX)
            templates[own] = _template(files, name)
    return templates


def _template(files: Mapping[str, Path], name: str) -> str:
    try:
        return files[name].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{name} is not UTF-8", reason="CORRUPT_CONFIG") from error


def has_chat_template(files: Mapping[str, Path]) -> bool:
    """Whether there is one that a chat gets by default; False also where it cannot be read."""
    with contextlib.suppress(TreadleError):
        embedded = _optional(files, "tokenizer_config.json").get("chat_template")
        return "default" in _chat_templates(files, embedded)
    return False


def license_of(files: Mapping[str, Path]) -> str:
    """The licence that the model card's front matter names."""
    if "README.md" not in files:
        return ""
    card = files["README.md"].read_text(encoding="utf-8", errors="replace")
    front = card.split("\n---", 1)[0] if card.startswith("---") else ""
    match = _LICENSE.search(front)
    return match[1] if match else ""


def _bfloat16_slices(path: Path, tensor: StoredTensor) -> Iterator[memoryview]:
    for piece in tensor_pieces(path, tensor):
        if tensor.dtype == "BF16":
            yield memoryview(piece)
            continue
        stored = np.frombuffer(piece, dtype=np.float32 if tensor.dtype == "F32" else np.float16)
        yield round_to_bfloat16(stored.astype(np.float32, copy=False)).data.cast("B")
