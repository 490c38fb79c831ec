"""A source whose files were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
