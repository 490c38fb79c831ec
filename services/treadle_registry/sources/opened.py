"""A source whose files were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from treadle_registry.formats.gguf_model import GgufModel
from treadle_registry.formats.huggingface_folder import HuggingFaceFolder

SourceModel = GgufModel | HuggingFaceFolder
"""What is read from a source: it checks itself, and stages its canonical form."""


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A model to import, and how its files may be taken."""

    model: SourceModel
    origin: str
    """Where it came from, for the manifest."""
    linked: bool = False
    """Its files are content that nobody changes: they get a second name in the store instead of a copy."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """What files must be, as far as the source says, by their names in hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of a model wherever they lie, by the names that they have at their source."""

    origin: str
    """"hub:owner/name@commit"."""
    files: Mapping[str, Path]
    """Config, tokenizer, card, index and weights, as far as they are there."""
    weights: tuple[str, ...]
    """Which of them are weights: safetensors, or one GGUF file."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """As `OpenedSource` has it."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return self.weights[0].endswith(".gguf")

    def opened(self, *, linked: bool) -> OpenedSource:
        """The model that they are; for safetensors config.json and a tokenizer must be among them."""
        model: SourceModel = (
            GgufModel(self.files[self.weights[0]])
            if self.is_gguf
            else HuggingFaceFolder.of_files(self.files, self.weights)
        )
        return OpenedSource(model, self.origin, linked, self.sha256)
