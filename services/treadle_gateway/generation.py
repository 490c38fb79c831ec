"""A generation as a client asks for it, in plain Python; None is "not set"."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_TENANT = "default"


class Priority(enum.IntEnum):
    """Which of a profile's lanes; numbers as in the contract."""

    UNSPECIFIED = 0
    LOW = 1
    NORMAL = 2
    HIGH = 3


class DisconnectMode(enum.IntEnum):
    """What it means when the client goes away; numbers as in the contract."""

    UNSPECIFIED = 0
    CANCEL = 1
    DETACH = 2


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt to tokenise."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that the client tokenised, and with what ("": not said)."""

    ids: tuple[int, ...]
    tokenizer_digest: str = ""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's chat template."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool | None = None
    template_arguments_json: str = ""


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When the answer ends."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_string: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What the answer carries beside its text."""

    logprobs: int | None = None
    include_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation, unchecked: enums and ids are what the client sent."""

    request_id: str = ""
    tenant: str = ""
    model: str = ""
    profile: str = ""
    adapter: str = ""
    priority: int = Priority.UNSPECIFIED
    prompt: Prompt | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    output: Output = field(default_factory=Output)
    disconnect_mode: int = DisconnectMode.UNSPECIFIED
    retention_s: float | None = None
    timeout_s: float | None = None
    payload_digest: str = ""
    """Of all that the client said but request_id and timeout; the same id with another one is refused."""

    @property
    def detaches(self) -> bool:
        """Whether the request goes on when its client goes away."""
        return self.disconnect_mode == DisconnectMode.DETACH
