"""What one request may ask for, checked before any work; every refusal names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from treadle.errors import invalid_field
from treadle.text.tokenizer import TextOrPair, Tokenizer
from treadle_tokenizer.config import TokenizerConfig

_MAX_MODEL_CHARACTERS = 256
_MAX_ROLE_CHARACTERS = 64


def check_model(model: str) -> None:
    """An alias or a digest."""
    if not 0 < len(model) <= _MAX_MODEL_CHARACTERS:
        raise invalid_field(
            "model", f"must be an alias or a digest of 1 to {_MAX_MODEL_CHARACTERS} characters"
        )


def check_texts(texts: Sequence[TextOrPair], config: TokenizerConfig) -> list[int]:
    """The UTF-8 bytes of each, with its pair."""
    _check_count(len(texts), config)
    totals = []
    for index, text in enumerate(texts):
        sizes = [_size(text)] if isinstance(text, str) else [_size(part) for part in text]
        if sum(sizes) > config.max_text_bytes:
            # The longer of a pair is at fault.
            field = "text" if sizes[0] == max(sizes) else "pair"
            raise invalid_field(
                f"inputs[{index}].{field}",
                f"must have at most {config.max_text_bytes} UTF-8 bytes with its pair; got {sum(sizes)}",
            )
        totals.append(sum(sizes))
    if (total := sum(totals)) > config.max_request_bytes:
        raise invalid_field(
            "inputs",
            f"must have at most {config.max_request_bytes} UTF-8 bytes in all; got {total}",
        )
    return totals


def check_ids(rows: Sequence[Sequence[int]], config: TokenizerConfig) -> int:
    """The number of all ids."""
    _check_count(len(rows), config)
    if (total := sum(map(len, rows))) > config.max_tokens:
        raise invalid_field("inputs", f"must have at most {config.max_tokens} ids in all; got {total}")
    return total


def check_vocabulary(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
    """No id past the vocabulary's end."""
    for index, row in enumerate(rows):
        if max(row, default=0) >= tokenizer.vocab_size:
            at = next(at for at, token_id in enumerate(row) if token_id >= tokenizer.vocab_size)
            raise invalid_field(
                f"inputs[{index}].ids[{at}]",
                f"must be less than the vocabulary's {tokenizer.vocab_size}; got {row[at]}",
            )


def check_messages(messages: Sequence[Mapping[str, str]], config: TokenizerConfig) -> int:
    """The UTF-8 bytes of all contents."""
    if not 0 < len(messages) <= config.max_messages:
        raise invalid_field("messages", f"must be 1 to {config.max_messages}; got {len(messages)}")
    total = 0
    for index, message in enumerate(messages):
        if not 0 < len(message["role"]) <= _MAX_ROLE_CHARACTERS:
            raise invalid_field(
                f"messages[{index}].role", f"must have 1 to {_MAX_ROLE_CHARACTERS} characters"
            )
        total += _size(message["content"])
        if total > config.max_text_bytes:
            raise invalid_field(
                f"messages[{index}].content",
                f"the messages must have at most {config.max_text_bytes} UTF-8 bytes in all",
            )
    return total


def template_arguments(text: str, config: TokenizerConfig) -> dict[str, Any]:
    """The JSON object of further arguments; none where the text is empty."""
    if not text:
        return {}
    if _size(text) > config.max_template_arguments_bytes:
        raise _bad_arguments(f"must have at most {config.max_template_arguments_bytes} bytes")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _bad_arguments(f"must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise _bad_arguments("must be a JSON object")
    return value


def _check_count(count: int, config: TokenizerConfig) -> None:
    if not 0 < count <= config.max_inputs:
        raise invalid_field("inputs", f"must be 1 to {config.max_inputs}; got {count}")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _bad_arguments(description: str) -> Exception:
    return invalid_field("template_arguments_json", description)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
