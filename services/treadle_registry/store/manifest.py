"""The manifest: what an artifact is, written last, beside its files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from treadle.errors import DataLoss, FailedPrecondition
from treadle.models.stored_folder import StoredFile
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.digests import Digests
from treadle_registry.store.task_facts import TaskFacts, decoder_facts

CONVERTER = "treadle-registry/2"
"""Who derives canonical forms; raised whenever the same source would give other bytes."""

_VERSION = 3
"""Raised with every field that comes or changes; what older manifests lack has a default."""


@dataclass(frozen=True, slots=True)
class DtypeShare:
    """How much of a model's files is of one type, as safetensors or GGUF names it."""

    dtype: str
    parameters: int
    bytes: int


def shares_of(tensors: Iterable[tuple[str, int, int]]) -> tuple[DtypeShare, ...]:
    """Of tensors' types, elements and bytes; the most parameters first."""
    found: dict[str, tuple[int, int]] = {}
    for dtype, elements, size in tensors:
        parameters, total = found.get(dtype, (0, 0))
        found[dtype] = (parameters + elements, total + size)
    shares = [DtypeShare(dtype, *counted) for dtype, counted in found.items()]
    return tuple(sorted(shares, key=lambda share: (-share.parameters, share.dtype)))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What people and planners ask of a model first."""

    model_type: str
    architecture: str
    parameters: int
    vocab_size: int
    context_length: int
    hidden_size: int
    num_layers: int
    license: str = ""
    has_chat_template: bool = False
    dtypes: tuple[DtypeShare, ...] = ()
    """Of the files as they came; empty in manifests from before they were counted."""
    quantization: str = ""
    """How the stored weights are quantised: "", "int8", "int4" or "mxfp4"."""

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ModelFacts:
        """What `asdict` gave; raises TypeError for anything else."""
        dtypes = tuple(DtypeShare(**share) for share in raw.get("dtypes", ()))
        return cls(**raw | {"dtypes": dtypes})


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's folder says of sampling; None: nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """An artifact. `digests` is None for a source that was only looked at (validate only)."""

    digests: Digests | None
    facts: ModelFacts
    defaults: GenerationDefaults
    files: tuple[StoredFile, ...]
    source_files: tuple[StoredFile, ...]
    source: str
    create_time: float
    """Seconds since 1970."""
    converter: str = CONVERTER
    parent_digest: str = ""
    derivation: Derivation | None = None
    """How it was made of its parent; None: it was imported."""
    task_facts: TaskFacts = field(default_factory=TaskFacts)
    """Older manifests lack them: they are of models that generate."""
    fetched_from: str = ""
    """The other registry that it came from, by its name in the settings. The files make the digests; of what
    they were made is that one's word, on which nothing is taken for made before."""

    @property
    def digest(self) -> str:
        """The artifact's digest; empty where nothing was stored."""
        return self.digests.artifact if self.digests else ""

    @property
    def total_bytes(self) -> int:
        """Bytes of all different files."""
        return sum({file.digest: file.size for file in (*self.files, *self.source_files)}.values())

    def to_json(self) -> str:
        """The manifest as it is stored."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Reads a manifest of this or an older release.

        Raises DataLoss (CORRUPT_MANIFEST) that names `where`, and FailedPrecondition (NEWER_MANIFEST).
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            version = raw.pop("version")
            if type(version) is not int or version < 1:
                raise ValueError("it has no version")
            if version > _VERSION:
                raise FailedPrecondition(
                    f"{where} has version {version}, this release knows {_VERSION}; use the newer release",
                    reason="NEWER_MANIFEST",
                )
            digests = raw.pop("digests")
            defaults = raw.pop("defaults")
            derivation = raw.pop("derivation", None)
            facts = ModelFacts.from_json(raw.pop("facts"))
            tasks = raw.pop("task_facts", None)
            return cls(
                digests=Digests(**digests) if digests else None,
                facts=facts,
                defaults=GenerationDefaults(**defaults | {"eos_token_ids": tuple(defaults["eos_token_ids"])}),
                files=tuple(StoredFile(**file) for file in raw.pop("files")),
                source_files=tuple(StoredFile(**file) for file in raw.pop("source_files")),
                derivation=Derivation(**derivation) if derivation else None,
                task_facts=TaskFacts.from_json(tasks) if tasks else decoder_facts(facts.context_length),
                **raw,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataLoss(
                f"{where} cannot be read: {str(error)[:100]}; import the model again, which replaces it",
                reason="CORRUPT_MANIFEST",
            ) from error
