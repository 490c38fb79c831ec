"""Which tensors of a canonical folder each module of an encoder gets."""

from __future__ import annotations

from torch import Tensor, cat

from treadle.models.encoder_tensors import NORM, POSITIONS, TYPES, WORDS
from treadle.models.families import encoder_names
from treadle.nn.encoder_model import EncoderModel


def sources(model: EncoderModel) -> dict[str, tuple[str, ...]]:
    """Of each of its parameters: the canonical tensors whose rows stand one after another in it.

    A head's modules get those of `EncoderNames.heads` in order.
    """
    config = model.config
    names = encoder_names(config)
    layer = names.layer
    parts: dict[str, tuple[str, ...]] = {"embeddings.norm": (NORM,)}
    for number in range(config.num_hidden_layers):
        ours, theirs = f"layers.{number}", f"{names.layers}.{number}"
        parts |= {
            f"{ours}.qkv": tuple(f"{theirs}.{name}" for name in (layer.query, layer.key, layer.value)),
            f"{ours}.attention_output": (f"{theirs}.{layer.attention_output}",),
            f"{ours}.attention_norm": (f"{theirs}.{layer.attention_norm}",),
            f"{ours}.intermediate": (f"{theirs}.{layer.intermediate}",),
            f"{ours}.output": (f"{theirs}.{layer.output}",),
            f"{ours}.output_norm": (f"{theirs}.{layer.output_norm}",),
        }
    if model.head is not None:
        modules = [name for name, _ in model.head.named_children()]
        heads = zip(modules, names.heads[config.head], strict=True)
        parts |= {f"head.{ours}": (theirs,) for ours, theirs in heads}
    tensors: dict[str, tuple[str, ...]] = {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in parts.items()
        for kind in ("weight", "bias")
    }
    tensors["embeddings.words.weight"] = (WORDS,)
    tensors["embeddings.positions.weight"] = (POSITIONS,)
    if config.type_vocab_size:
        tensors["embeddings.types.weight"] = (TYPES,)
    return tensors


def take(state: dict[str, Tensor], model: EncoderModel) -> dict[str, Tensor]:
    """The model's state, of a canonical folder's tensors; empties `state`."""
    taken = {}
    for ours, theirs in sources(model).items():
        parts = [state.pop(name) for name in theirs]
        taken[ours] = parts[0] if len(parts) == 1 else cat(parts)
    assert not state
    return taken
