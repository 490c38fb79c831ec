"""What a quantised checkpoint says of itself: typed values of its configuration, layers of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from treadle.errors import InvalidArgument
from treadle_registry.formats.safetensors_file import StoredTensor

Tensors = Mapping[str, StoredTensor]
_MAX_LIST = 1000
_MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """A configuration's own words; `where` is its file and key, for people."""

    raw: Mapping[str, Any]
    where: str

    def whole(self, *names: str, low: int, high: int, default: int | None = None) -> int | None:
        """The first that is there; raises InvalidArgument (CORRUPT_CONFIG) for what is no such number."""
        for name in names:
            value = self.raw.get(name)
            if value is not None:
                if type(value) is not int or not low <= value <= high:
                    raise self.corrupt(name, f"must be a whole number from {low} to {high}", value)
                return value
        return default

    def flag(self, *names: str, default: bool = False) -> bool:
        """The first that is there; raises InvalidArgument (CORRUPT_CONFIG) for what is not true or false."""
        for name in names:
            value = self.raw.get(name)
            if value is not None:
                if not isinstance(value, bool):
                    raise self.corrupt(name, "must be true or false", value)
                return value
        return default

    def text(self, *names: str, default: str = "") -> str:
        """The first that is there, in small letters; raises InvalidArgument (CORRUPT_CONFIG) for no text."""
        for name in names:
            value = self.raw.get(name)
            if value is not None:
                if not isinstance(value, str) or len(value) > _MAX_NAME:
                    raise self.corrupt(name, "must be a word", value)
                return value.lower()
        return default

    def names(self, *keys: str) -> tuple[str, ...]:
        """A list of modules; raises InvalidArgument (CORRUPT_CONFIG) for another list."""
        for key in keys:
            value = self.raw.get(key)
            if value is not None:
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise self.corrupt(key, "must list modules", value)
                return tuple(name[:_MAX_NAME] for name in value[:_MAX_LIST])
        return ()

    def inner(self, name: str) -> QuantizationConfig | None:
        """An object within; None where there is none."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.corrupt(name, "must be an object", value)
        return QuantizationConfig(value, f"{self.where}: {name[:_MAX_NAME]}")

    def corrupt(self, name: str, what: str, value: object) -> InvalidArgument:
        """The error that names the key."""
        return InvalidArgument(
            f"{self.where}: {name} {what}; got {str(value)[:80]!r}; take the model's own file",
            reason="CORRUPT_CONFIG",
        )


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A linear layer whose weights are quantised; its sizes are None where the tensors do not tell them."""

    elements: int
    inputs: int | None = None
    outputs: int | None = None
    is_filled: bool = False
    """Whether some of the inputs may only fill a word up."""


@dataclass(slots=True)
class QuantizedLayout:
    """What a method's reader found. A layer is named by its module."""

    format: str = ""
    bits: int = 0
    group_size: int = 0
    strategy: str = ""
    symmetric: bool = True
    activation_order: bool = False
    activation_bits: int = 0
    ignored: tuple[str, ...] = ()
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    """Tensors that belong to quantised layers."""
    problems: list[str] = field(default_factory=list)
    """Where tensors and configuration contradict one another."""
    because: str = ""
    """Why no code here multiplies with such weights, as the end of a sentence."""

    def take(self, tensors: Tensors, base: str, *kinds: str) -> list[StoredTensor | None]:
        """The tensors `base.kind`, which belong to the layer."""
        found: list[StoredTensor | None] = []
        for kind in kinds:
            name = f"{base}.{kind}"
            found.append(tensors.get(name))
            if name in tensors:
                self.parts.add(name)
        return found


def modules_with(tensors: Tensors, kind: str) -> list[str]:
    """The modules that have a tensor of that name."""
    suffix = f".{kind}"
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def is_matrix(tensor: StoredTensor | None, *dtypes: str) -> bool:
    """Whether it is there, has two dimensions, and one of these types."""
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype in dtypes
