"""The module tree of every architecture: a new family adds its builder here. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from treadle.models import llama
from treadle.models.config import ModelConfig
from treadle.models.module_tree import ModuleTree

_TREES: Mapping[str, Callable[[ModelConfig], ModuleTree]] = {
    "llama": llama.module_tree,
    "mistral": llama.module_tree,
    "qwen2": llama.module_tree,
    "qwen3": llama.module_tree,
}


def module_tree(config: ModelConfig) -> ModuleTree:
    """The modules of a model of any supported type."""
    return _TREES[config.model_type](config)
