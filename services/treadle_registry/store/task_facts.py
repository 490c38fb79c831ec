"""What can be asked of a model, and what its folder says of how; part of what an artifact presents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """As the contract has them. A field's default is what a folder means that says nothing of it."""

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
    """"cosine", "dot"; empty: another one, by which nothing is ranked here."""
    max_input_tokens: int = 0
    """Of a text, or a pair, special ones included."""

    def presented(self) -> dict[str, Any]:
        """What is not the default: a field that comes with a later release changes no older digest."""
        defaults = asdict(TaskFacts())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> TaskFacts:
        """What `asdict` gave; raises TypeError for anything else."""
        lists = {name: tuple(raw[name]) for name in ("tasks", "labels") if name in raw}
        if unknown := raw.keys() - {known.name for known in fields(cls)}:
            raise TypeError(f"task_facts has {min(unknown)[:100]!r}")
        return cls(**{**raw, **lists})


def decoder_facts(context_length: int) -> TaskFacts:
    """Of every model that generates, those among older manifests too."""
    return TaskFacts(tasks=("generate", "score"), max_input_tokens=context_length)
