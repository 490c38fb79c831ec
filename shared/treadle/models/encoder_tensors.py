"""How a family of encoders names its tensors, and their shapes. No torch.

The canonical names are those of the bare encoder in Hugging Face folders, and of the heads beside it.
E: hidden size; I: inner size; L: labels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from treadle.models.encoder_config import EncoderConfig, Head
from treadle.models.module_tree import Module, ModuleTensor, ModuleTree

Shape = tuple[int, ...]

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
NORM = "embeddings.LayerNorm"

QUANTIZED = ("attention_output", "intermediate", "output")
"""The products of a layer that int8 is for, as `LayerNames` calls them. Not queries, keys and values: a few
dimensions of the stream are some ten times the others, and beside them 8 bits are too few."""
QUANTIZED_GROUP = 32
"""Inputs of such a product that share a scale, for the same reason fewer than a decoder's."""

_OLD_ENDINGS = {"gamma": "weight", "beta": "bias"}
"""How the first checkpoints, made of TensorFlow's, call what a norm scales and shifts with."""


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Modules of a layer, below the layer's own name, in the order of transformers."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str


@dataclass(frozen=True, slots=True)
class EncoderNames:
    """A family's names. `prefix` stands before the encoder's in the files of models with a head."""

    class_name: str
    prefix: str
    layers: str
    layer: LayerNames
    layer_class: str
    heads: Mapping[Head, Mapping[str, Callable[[EncoderConfig], Shape]]]
    """Of each head: its modules in order, and the shape [out, in] of each one's weight."""
    optional: Collection[str]
    """Modules [E, E] that a bare encoder's files may have, and that no task here needs."""
    dropped: tuple[str, ...]
    """What other names that are left out begin with: heads of the pre-training."""

    def expected(self, config: EncoderConfig) -> dict[str, Shape]:
        """Every tensor that must be stored."""
        hidden, inner = config.hidden_size, config.intermediate_size
        tensors: dict[str, Shape] = {
            WORDS: (config.vocab_size, hidden),
            POSITIONS: (config.max_position_embeddings, hidden),
        }
        if config.type_vocab_size:
            tensors[TYPES] = (config.type_vocab_size, hidden)
        tensors |= _norm(NORM, hidden)
        for number in range(config.num_hidden_layers):
            layer, base = self.layer, f"{self.layers}.{number}"
            for name in (layer.query, layer.key, layer.value, layer.attention_output):
                tensors |= _linear(f"{base}.{name}", (hidden, hidden))
            tensors |= _norm(f"{base}.{layer.attention_norm}", hidden)
            tensors |= _linear(f"{base}.{layer.intermediate}", (inner, hidden))
            tensors |= _linear(f"{base}.{layer.output}", (hidden, inner))
            tensors |= _norm(f"{base}.{layer.output_norm}", hidden)
        for name, shape in self.heads[config.head].items():
            tensors |= _linear(name, shape(config))
        return tensors

    def optional_tensors(self, config: EncoderConfig) -> dict[str, Shape]:
        """What may be stored beside it."""
        tensors: dict[str, Shape] = {}
        for name in self.optional if not config.head else ():
            tensors |= _linear(name, (config.hidden_size, config.hidden_size))
        return tensors

    def quantized_weights(self, config: EncoderConfig) -> list[tuple[int, int]]:
        """Outputs and inputs of each product that int8 is for."""
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = {"attention_output": (hidden, hidden), "intermediate": (inner, hidden)}
        return [shapes.get(name, (hidden, inner)) for name in QUANTIZED] * config.num_hidden_layers

    def canonical(self, config: EncoderConfig, name: str) -> str | None:
        """The canonical name of a tensor of a Hugging Face folder; None: it is left out."""
        name = name.removeprefix(f"{self.prefix}.")
        start, _, end = name.rpartition(".")
        if name in ("embeddings.position_ids", "embeddings.token_type_ids") or name.startswith(self.dropped):
            return None
        needed = (*self.heads[config.head], *(self.optional if not config.head else ()))
        if start in self.optional and start not in needed:
            return None
        return f"{start}.{_OLD_ENDINGS[end]}" if start and end in _OLD_ENDINGS else name

    def tree(self, config: EncoderConfig) -> ModuleTree:
        """The modules as transformers has them, where a model with a head has the prefix before its encoder.

        Left out are buffers: token positions, which no device map turns on.
        """
        tensors = self.expected(config)
        prefix = f"{self.prefix}." if config.head else ""
        head = tuple(self.heads[config.head])
        pooled = tuple(self.optional) if not config.head else tuple(n for n in head if n in self.optional)
        tensors |= self.optional_tensors(config)
        encoder = (
            self._module("embeddings", f"{self.class_name}Embeddings", prefix, tensors),
            Module(
                f"{prefix}{self.layers.rpartition('.')[0]}",
                f"{self.class_name}Encoder",
                children=(
                    Module(
                        f"{prefix}{self.layers}",
                        "ModuleList",
                        children=tuple(
                            self._module(f"{self.layers}.{number}", self.layer_class, prefix, tensors)
                            for number in range(config.num_hidden_layers)
                        ),
                    ),
                ),
            ),
            *(
                self._module(each, f"{self.class_name}Pooler", prefix, tensors)
                for each in dict.fromkeys(name.split(".")[0] for name in pooled)
            ),
        )
        no_split = frozenset({f"{self.class_name}Embeddings", self.layer_class})
        if not config.head:
            return ModuleTree(Module("", f"{self.class_name}Model", children=encoder), no_split)
        rest = dict.fromkeys(name.split(".")[0] for name in head if name not in pooled)
        children = (
            Module(self.prefix, f"{self.class_name}Model", children=encoder),
            *(self._module(each, f"{self.class_name}Head", "", tensors) for each in rest),
        )
        return ModuleTree(Module("", f"{self.class_name}Classification", children=children), no_split)

    def _module(self, path: str, kind: str, prefix: str, tensors: Mapping[str, Shape]) -> Module:
        """A module with all that lies below it, as names say; a module of tensors alone is a leaf."""
        below = [name.removeprefix(f"{path}.") for name in tensors if name.startswith(f"{path}.")]
        own = tuple(
            ModuleTensor(f"{prefix}{path}.{name}", tensors[f"{path}.{name}"], self._is_product(path, name))
            for name in below
            if "." not in name
        )
        leaf = "Embedding" if "embeddings" in path else "LayerNorm" if len(own) == 2 else "Linear"
        parts = dict.fromkeys(name.split(".")[0] for name in below if "." in name)
        return Module(
            f"{prefix}{path}",
            kind or leaf,
            own,
            tuple(self._module(f"{path}.{part}", "", prefix, tensors) for part in parts),
        )

    def _is_product(self, path: str, name: str) -> bool:
        """Whether it is the weight of a linear layer within a block."""
        names = self.layer
        products = (
            names.query,
            names.key,
            names.value,
            names.attention_output,
            names.intermediate,
            names.output,
        )
        inside = path.removeprefix(f"{self.layers}.").partition(".")[2]
        return path.startswith(f"{self.layers}.") and name == "weight" and inside in products


def to_hidden(config: EncoderConfig) -> Shape:
    """[E, E]."""
    return (config.hidden_size, config.hidden_size)


def to_labels(config: EncoderConfig) -> Shape:
    """[L, E]."""
    return (config.num_labels, config.hidden_size)


def _linear(name: str, shape: Shape) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm(name: str, size: int) -> dict[str, Shape]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
