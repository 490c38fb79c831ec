"""What a client asks for: one generation, with every option by the contract's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `role` is "system", "user", "assistant" or what the template knows."""

    role: str
    content: str


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`: GenerationRequest's fields but the prompt."""

    messages: Sequence[Message | Mapping[str, str]] | None
    token_ids: Sequence[int] | None
    model: str
    request_id: str
    tenant: str
    profile: str
    adapter: str
    priority: Literal["low", "normal", "high"]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float]
    n: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop_strings: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_string: bool
    logprobs: int | None
    include_special_tokens: bool
    detach: bool
    retention_s: float | None
    tokenizer_digest: str
    add_generation_prompt: bool | None
    template_arguments: Mapping[str, object]
    timeout_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation. Exactly one of `prompt`, `messages` and `token_ids` is set.

    An option that is None (or empty) takes the model's default. `request_id` empty: the client makes one,
    so that a lost connection never runs a request twice.
    """

    prompt: str | None = None
    messages: Sequence[Message | Mapping[str, str]] | None = None
    token_ids: Sequence[int] | None = None
    model: str = ""
    """An alias or an artifact digest; empty: the client's model."""
    request_id: str = ""
    tenant: str = ""
    profile: str = ""
    adapter: str = ""
    priority: Literal["low", "normal", "high"] = "normal"
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    n: int | None = None
    """Number of choices."""
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_string: bool = False
    logprobs: int | None = None
    """Log-probabilities of the chosen token and so many best ones; None: none."""
    include_special_tokens: bool = False
    detach: bool = False
    """Go on when this client goes away, so that it can attach again."""
    retention_s: float | None = None
    """With `detach`: seconds that the answer waits for a client after its end."""
    tokenizer_digest: str = ""
    """With `token_ids`: the tokenizer that made them."""
    add_generation_prompt: bool | None = None
    template_arguments: Mapping[str, object] | None = None
    """With `messages`: further arguments of the chat template."""
    timeout_s: float | None = None
    """Seconds for the whole request; None: the client's."""
