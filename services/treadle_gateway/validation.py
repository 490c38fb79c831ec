"""Everything about a generation that can be judged without knowing its model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from treadle_gateway.addressing import MAX_NAME, check_addressed, refuse, refuse_adapter
from treadle_gateway.config import GatewayConfig
from treadle_gateway.generation import (
    ChatPrompt,
    DisconnectMode,
    Generation,
    Output,
    Prompt,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)
from treadle_gateway.violations import Violations, shown

MAX_SEED = 2**64 - 1
MAX_PENALTY = 100.0
"""Bound of the penalties: beyond it the logits would leave the range in which they mean anything."""


def validate(generation: Generation, limits: GatewayConfig) -> None:
    """Checks every field.

    Raises InvalidArgument, or Unimplemented for what the contract has and no code serves yet.
    """
    found = Violations()
    check_addressed(found, generation, limits, prefix="generation.")
    _check_prompt(found, generation.prompt, limits)
    _check_sampling(found, generation.sampling, limits)
    _check_stopping(found, generation.stopping, limits)
    _check_output(found, generation.output, limits)
    _check_disconnect(found, generation, limits)
    found.check()
    _refuse_unimplemented(generation)


def _check_prompt(found: Violations, prompt: Prompt | None, limits: GatewayConfig) -> None:
    match prompt:
        case None:
            found.add("generation.prompt", "must be given: set one of text, token_ids and chat")
        case TextPrompt(text):
            found.require(bool(text), "generation.text", "must not be empty; send at least a word")
            _check_bytes(found, "generation.text", len(text.encode()), limits)
        case TokenPrompt(ids, digest):
            found.require(bool(ids), "generation.token_ids.ids", "must hold at least one id")
            found.require(
                len(digest) <= MAX_NAME,
                "generation.token_ids.tokenizer_digest",
                'must be a digest ("sha256:…") or empty',
            )
        case ChatPrompt():
            _check_chat(found, prompt, limits)


def _check_bytes(found: Violations, field: str, size: int, limits: GatewayConfig) -> None:
    found.require(
        size <= limits.max_prompt_bytes,
        field,
        f"must be at most {limits.max_prompt_bytes} bytes of UTF-8; got {size}. Shorten the prompt",
    )


def _check_chat(found: Violations, chat: ChatPrompt, limits: GatewayConfig) -> None:
    count = len(chat.messages)
    found.require(
        1 <= count <= limits.max_chat_messages,
        "generation.chat.messages",
        f"must be 1 to {limits.max_chat_messages} messages; got {count}",
    )
    for number, message in enumerate(chat.messages[: limits.max_chat_messages]):
        found.require(
            1 <= len(message.role) <= 64,
            f"generation.chat.messages[{number}].role",
            f'must be 1 to 64 characters, such as "user"; got {shown(message.role)}',
        )
    size = sum(len(message.content.encode()) for message in chat.messages)
    _check_bytes(found, "generation.chat.messages", size, limits)
    if problem := _problem_of_arguments(chat.template_arguments_json, limits.max_template_arguments_bytes):
        found.add("generation.chat.template_arguments_json", problem)


def _problem_of_arguments(text: str, limit: int) -> str:
    """What is wrong with the template's arguments; empty: nothing."""
    if not text:
        return ""
    if len(text.encode()) > limit:
        return f"must be at most {limit} bytes"
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 'must be a JSON object, such as {"enable_thinking": false}; it cannot be parsed'
    return "" if isinstance(value, dict) else "must be a JSON object, not another JSON value"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_sampling(found: Violations, sampling: Sampling, limits: GatewayConfig) -> None:
    field = "generation.sampling"
    _within(found, f"{field}.temperature", sampling.temperature, 0.0, MAX_PENALTY, "0 is greedy")
    found.require(
        sampling.top_p is None or 0.0 < sampling.top_p <= 1.0,
        f"{field}.top_p",
        f"must be in (0, 1]; got {sampling.top_p}. 1 keeps all tokens",
    )
    _within(found, f"{field}.min_p", sampling.min_p, 0.0, 1.0, "0 keeps all tokens")
    found.require(
        sampling.repetition_penalty is None or 0.0 < sampling.repetition_penalty <= MAX_PENALTY,
        f"{field}.repetition_penalty",
        f"must be in (0, {MAX_PENALTY:g}]; got {sampling.repetition_penalty}. 1 is off",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        _within(found, f"{field}.{name}", getattr(sampling, name), -MAX_PENALTY, MAX_PENALTY, "0 is off")
    found.require(
        sampling.top_k is None or sampling.top_k < 2**31,
        f"{field}.top_k",
        f"must be below 2^31; got {sampling.top_k}. 0 keeps all tokens",
    )
    found.require(
        sampling.seed is None or 0 <= sampling.seed <= MAX_SEED,
        f"{field}.seed",
        f"must be an unsigned 64-bit number; got {sampling.seed}",
    )
    found.require(sampling.n != 0, f"{field}.n", "must be at least 1; got 0. Leave it unset for 1")
    _check_bias(found, sampling, limits)


def _check_bias(found: Violations, sampling: Sampling, limits: GatewayConfig) -> None:
    field, count = "generation.sampling.logit_bias", len(sampling.logit_bias)
    if count > limits.max_logit_bias:
        found.add(field, f"must have at most {limits.max_logit_bias} entries; got {count}")
        return
    for token_id, bias in sampling.logit_bias.items():
        if found.full:
            return
        _within(found, f"{field}[{token_id}]", bias, -100.0, 100.0, "0 is off")


def _within(
    found: Violations, field: str, value: float | None, least: float, most: float, way_out: str
) -> None:
    """NaN fails every comparison, and so is refused with what is out of bounds."""
    found.require(
        value is None or (least <= value <= most and math.isfinite(value)),
        field,
        f"must be in [{least:g}, {most:g}]; got {value}. {way_out}",
    )


def _check_stopping(found: Violations, stopping: Stopping, limits: GatewayConfig) -> None:
    field = "generation.stopping"
    found.require(
        stopping.max_new_tokens != 0,
        f"{field}.max_new_tokens",
        "must be at least 1; got 0. Leave it unset for what the context leaves",
    )
    if stopping.max_new_tokens and (stopping.min_new_tokens or 0) > stopping.max_new_tokens:
        found.add(
            f"{field}.min_new_tokens",
            f"must be at most max_new_tokens ({stopping.max_new_tokens}); got {stopping.min_new_tokens}",
        )
    _check_stop_strings(found, stopping.stop_strings, limits)
    found.require(
        len(stopping.stop_token_ids) <= limits.max_stop_token_ids,
        f"{field}.stop_token_ids",
        f"must be at most {limits.max_stop_token_ids} ids; got {len(stopping.stop_token_ids)}",
    )


def _check_stop_strings(found: Violations, strings: Sequence[str], limits: GatewayConfig) -> None:
    field = "generation.stopping.stop_strings"
    if len(strings) > limits.max_stop_strings:
        found.add(
            field,
            f"must be at most {limits.max_stop_strings} strings; got {len(strings)}. "
            "Send the ones that matter",
        )
        return
    for number, string in enumerate(strings):
        size = len(string.encode())
        found.require(
            1 <= size <= limits.max_stop_string_bytes,
            f"{field}[{number}]",
            f"must be 1 to {limits.max_stop_string_bytes} bytes of UTF-8; got {size}",
        )


def _check_output(found: Violations, output: Output, limits: GatewayConfig) -> None:
    found.require(
        output.logprobs is None or 0 <= output.logprobs <= limits.max_logprobs,
        "generation.output.logprobs",
        f"must be at most {limits.max_logprobs}; got {output.logprobs}. "
        "0 is the chosen token's alone, unset is none",
    )


def _check_disconnect(found: Violations, generation: Generation, limits: GatewayConfig) -> None:
    mode, retention_s = generation.disconnect_mode, generation.retention_s
    found.require(
        mode in list(DisconnectMode),
        "generation.disconnect.mode",
        f"{mode} is no DisconnectMode; use CANCEL (1), DETACH (2) or leave it unset",
    )
    if retention_s is None:
        return
    found.require(
        0 < retention_s <= limits.max_retention_s,
        "generation.disconnect.retention",
        f"must be over 0 and at most {limits.max_retention_s:g} s; got {retention_s} s",
    )
    found.require(
        generation.detaches or mode not in list(DisconnectMode),
        "generation.disconnect.retention",
        "is for DETACH alone: set disconnect.mode to DISCONNECT_MODE_DETACH, or leave it unset",
    )


def _refuse_unimplemented(generation: Generation) -> None:
    refuse_adapter(generation, prefix="generation.")
    if generation.sampling.n not in (None, 1):
        refuse("generation.sampling.n", "more than one choice is not served yet; send n requests")
