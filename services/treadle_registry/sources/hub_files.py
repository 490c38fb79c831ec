"""Which files of a repository make the model, by their names alone and as Transformers names them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from treadle.errors import InvalidArgument, NotFound
from treadle.transfer.file_names import is_file_name, is_inner_name
from treadle_registry.formats.huggingface_folder import PICKLE_SUFFIXES, named_shards
from treadle_registry.formats.json_files import read_json
from treadle_registry.formats.tokenizers import files as tokenizer_files
from treadle_registry.sources.hub_source import HubSource

_TEXT = re.compile(
    r"config\.json|generation_config\.json|tokenizer(?:_config)?\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(?:json|txt|bpe)|merges\.txt|encoder\.json|sentencepiece\.bpe\.model"
    r"|[A-Za-z0-9_]+\.(?:model|jinja)|chat_template\.json"
    r"|modules\.json|config_sentence_transformers\.json|sentence_[a-z-]{1,32}_config\.json"
    r"|README\.md|(?i:LICEN[CS]E|NOTICE)[A-Za-z0-9._-]{0,32}"
)
"""Configuration, tokenizer, templates, defaults, sentence-transformers' files, licence and card."""
_VARIANT_OF = re.compile(
    r"model\.([A-Za-z0-9_-]+?)(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.([A-Za-z0-9_-]+)\.json"
)
_SPLIT_GGUF = re.compile(r".+-\d{5}-of-\d{5}\.gguf")
MAX_INDEX = 16 << 20
MAX_TEXT = 256 << 20
"""Bytes of a file that is no file of weights."""
_MAX_SHARDS = 1024
_SAID = 10
"""Names in a message."""


def index_name(variant: str) -> str:
    """The index of sharded weights: model.safetensors.index.json, with a variant between the last two."""
    return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"


def single_name(variant: str) -> str:
    """The file of weights that are in one: model.safetensors, model.fp16.safetensors."""
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def is_index(name: str) -> bool:
    """Whether what `weights_file` chose is an index of shards."""
    return name.endswith(".json")


def text_files(names: Collection[str]) -> list[str]:
    """What is read of a model beside its weights."""
    found = [name for name in names if _TEXT.fullmatch(name) or is_inner_name(name)]
    return sorted(name for name in found if not name.endswith(PICKLE_SUFFIXES))


def required(names: Collection[str]) -> tuple[str, ...]:
    """Of all files those that every model needs: its configuration, and its tokenizer in one form."""
    return ("config.json", *(tokenizer_files.made_of(names) or ("tokenizer.json",)))


def check_required(names: Collection[str]) -> None:
    """Raises InvalidArgument (MISSING_FILE) where a file is not there that every model needs, and
    FailedPrecondition (UNSUPPORTED_TOKENIZER) where its tokenizer is in a form that is not read."""
    if "config.json" not in names:
        raise InvalidArgument(
            "the repository has no config.json; take one whose model is in Transformers' form",
            reason="MISSING_FILE",
        )
    tokenizer_files.check_there(names)


def weights_file(wanted: HubSource, names: Collection[str]) -> str:
    """The index, the single file of weights, or the GGUF file that is wanted.

    Raises NotFound: HUB_FILE_NOT_FOUND, VARIANT_NOT_FOUND; InvalidArgument: PICKLE_WEIGHTS, MISSING_FILE,
    SPLIT_GGUF.
    """
    if wanted.gguf_file:
        return _gguf_file(wanted.gguf_file, names)
    for name in (index_name(wanted.variant), single_name(wanted.variant)):
        if name in names:
            return name
    variants = sorted({found[1] or found[2] for name in names if (found := _VARIANT_OF.fullmatch(name))})
    if wanted.variant:
        raise NotFound(
            f"the repository has no weights of the variant {wanted.variant!r}; it has: "
            + (", ".join(variants[:_SAID]) or "none"),
            reason="VARIANT_NOT_FOUND",
        )
    single = [name for name in names if name.endswith(".safetensors") and is_file_name(name)]
    if len(single) == 1 and not variants:
        return single[0]
    raise _no_weights(names, variants)


def _gguf_file(name: str, names: Collection[str]) -> str:
    if name not in names:
        raise NotFound(
            f"the repository has no file {name}; its GGUF files: {_some_gguf(names)}",
            reason="HUB_FILE_NOT_FOUND",
        )
    if _SPLIT_GGUF.fullmatch(name):
        raise InvalidArgument(
            f"{name} is a part of a model in several GGUF files, which are not read; choose one that is "
            "whole, or merge them (llama-gguf-split --merge) and import the file",
            reason="SPLIT_GGUF",
        )
    return name


def _no_weights(names: Collection[str], variants: Sequence[str]) -> InvalidArgument:
    if variants:
        return InvalidArgument(
            f"the repository has weights only as variants; ask for one: {', '.join(variants[:_SAID])}",
            reason="MISSING_FILE",
        )
    if any(name.endswith(".gguf") for name in names):
        return InvalidArgument(
            f"the repository has GGUF files; name the one to take as gguf_file: {_some_gguf(names)}",
            reason="MISSING_FILE",
        )
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        return InvalidArgument(
            "the repository has its weights only in Python's pickle format, which can run code and is "
            "never read; look for a revision with safetensors (the hub's converter proposes one as "
            "refs/pr/N), or convert them where you trust them (in transformers: load and save_pretrained) "
            "and import the folder",
            reason="PICKLE_WEIGHTS",
        )
    return InvalidArgument(
        f"the repository has neither {single_name('')} nor {index_name('')}; choose one with a model",
        reason="MISSING_FILE",
    )


def _some_gguf(names: Collection[str]) -> str:
    found = sorted(name for name in names if name.endswith(".gguf"))
    return ", ".join(found[:_SAID]) + (", …" if len(found) > _SAID else "") or "none"


def shards_of(index: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The shards that an index names; raises InvalidArgument (CORRUPT_WEIGHTS, PATH_OUTSIDE)."""
    shards = named_shards(index, name)
    if len(shards) > _MAX_SHARDS:
        raise InvalidArgument(
            f"{name} names {len(shards)} files; at most {_MAX_SHARDS} are taken", reason="TOO_MANY_FILES"
        )
    return shards


def weight_names(chosen: str, files: Mapping[str, Path]) -> tuple[str, ...]:
    """The files of weights that `weights_file` chose: itself, or the shards of the index among `files`."""
    return shards_of(read_json(files[chosen], MAX_INDEX), chosen) if is_index(chosen) else (chosen,)


def check_shards(shards: Sequence[str], index: str, names: Collection[str]) -> None:
    """Raises InvalidArgument (MISSING_FILE) for shards that are not there."""
    if missing := [shard for shard in shards if shard not in names]:
        raise InvalidArgument(
            f"{index} names {len(missing)} files that the repository does not have: "
            + ", ".join(missing[:_SAID])
            + "; take a revision that is whole",
            reason="MISSING_FILE",
        )
