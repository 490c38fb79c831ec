"""What the gateway needs to know of a model in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DECODER_TASKS = ("generate", "score")


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


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What can be asked of a model, and what its folder says of how; as in the registry's contract."""

    tasks: tuple[str, ...] = DECODER_TASKS
    pooling: str = ""
    normalize: bool = False
    embedding_dimensions: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    skip_prompt: bool = False
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    rank_activation: str = ""
    similarity: str = ""
    max_input_tokens: int = 0
    """0: the folder does not say."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What the gateway needs to know of a model in the store."""

    digest: str
    compute_digest: str
    tokenizer_digest: str
    vocab_size: int
    context_length: int
    defaults: GenerationDefaults
    model_type: str = ""
    """As config.json names it."""
    facts: TaskFacts = field(default_factory=TaskFacts)
