"""A model as a tree of modules with the shapes of their tensors: what is planned over without loading it.

Names, order and kinds are those of the classes in transformers, so that a device map made here is one that
accelerate understands. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from treadle.models.element_sizes import DTYPE_BYTES, element_bytes


@dataclass(frozen=True, slots=True)
class ModuleTensor:
    """A parameter or buffer; `name` is whole, as in "model.norm.weight"."""

    name: str
    shape: tuple[int, ...]
    is_quantizable: bool = False
    """A weight that is quantised where the model is: of a linear layer within a block."""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Module:
    """A module; `name` is whole, "" for the model itself, and `kind` is its class."""

    name: str
    kind: str
    parameters: tuple[ModuleTensor, ...] = ()
    children: tuple[Module, ...] = ()
    buffers: tuple[ModuleTensor, ...] = ()
    """Float32 tables that no file holds."""

    def walk(self) -> Iterator[Module]:
        """This module and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class ModuleTree:
    """A model's modules, the kinds that a device map never divides, and the parameters that are one."""

    root: Module
    no_split: frozenset[str]
    ties: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are another: the later one's name to the first one's."""

    def parameters(self) -> Iterator[ModuleTensor]:
        """Every parameter, tied ones once."""
        for module in self.root.walk():
            for tensor in module.parameters:
                if tensor.name not in self.ties:
                    yield tensor

    def tensors(self) -> Iterator[ModuleTensor]:
        """Every parameter, tied ones once, then every buffer."""
        yield from self.parameters()
        for module in self.root.walk():
            yield from module.buffers

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(tensor.elements for tensor in self.parameters())

    def tied_groups(self) -> list[list[str]]:
        """Names that are one parameter, each group sorted."""
        groups: dict[str, list[str]] = {}
        for name, first in self.ties.items():
            groups.setdefault(first, [first]).append(name)
        return [sorted(group) for group in groups.values()]


def tensor_bytes(tree: ModuleTree, dtype: str, quantization: str = "") -> dict[str, float]:
    """Bytes of every parameter (tied ones once) and buffer by name.

    `dtype` is "float32", "float16" or "bfloat16"; `quantization` "", "int8", "int4" or a GGUF format
    such as "Q4_K", for the layers that are quantised only. Buffers are float32, or narrower with `dtype`.
    Half-byte elements can give fractions. Raises KeyError for an unknown type.
    """
    width = DTYPE_BYTES[dtype]
    quantized = element_bytes(quantization) if quantization else width
    sizes: dict[str, float] = {
        tensor.name: tensor.elements * (quantized if tensor.is_quantizable else width)
        for tensor in tree.parameters()
    }
    for module in tree.root.walk():
        sizes |= {buffer.name: buffer.elements * width for buffer in module.buffers}
    return sizes


def module_bytes(sizes: Mapping[str, float]) -> dict[str, float]:
    """Bytes of every tensor and of every module that holds one, "" being all; `sizes` are the tensors'."""
    totals: dict[str, float] = {}
    for name, size in sizes.items():
        parts = name.split(".")
        for count in range(len(parts) + 1):
            prefix = ".".join(parts[:count])
            totals[prefix] = totals.get(prefix, 0) + size
    return totals
