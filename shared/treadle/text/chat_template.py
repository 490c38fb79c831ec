"""An artifact's chat template and the tokens that it may name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.errors import FailedPrecondition

MAX_TEMPLATE_BYTES = 1 << 20
"""The largest known template has 20 KB."""
_MAX_CONFIG_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template's source and the special tokens that it reads by name ("bos_token", …)."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """From chat_template.jinja or else tokenizer_config.json; None where the artifact has no template.

        Blocks on the disk. Raises FailedPrecondition, reason CHAT_TEMPLATE_FAILED, where it cannot be read.
        """
        try:
            source = _read(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
            if source is None:
                config = _read(folder / "tokenizer_config.json", _MAX_CONFIG_BYTES)
                source = None if config is None else _from_config(json.loads(config))
        except ValueError as error:
            raise FailedPrecondition(
                f"the artifact's chat template cannot be read: {error}", reason="CHAT_TEMPLATE_FAILED"
            ) from error
        return None if source is None else cls(source, dict(special_tokens))


def _read(path: Path, max_bytes: int) -> str | None:
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    if len(content) > max_bytes:
        raise ValueError(f"{path.name} is larger than {max_bytes} bytes")
    # Not through text mode: it would change the template's line ends.
    return content.decode()


def _from_config(config: Any) -> str | None:
    """One template, or the one named "default" of several."""
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
