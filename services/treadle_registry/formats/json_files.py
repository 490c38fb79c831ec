"""JSON files of a model, as strangers write them and as the canonical ones are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from treadle.errors import InvalidArgument

_MAX_JSON = 16 << 20
"""Of tokenizer_config.json, which may list every added token."""
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""The first of two halves, or the second, as JSON or UTF-8 has them."""


def json_bytes(value: object) -> bytes:
    """JSON as the canonical files have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, max_bytes: int = _MAX_JSON, *, name: str = "") -> dict[str, Any]:
    """A JSON object; raises InvalidArgument (CORRUPT_CONFIG) that names the file, as `name` where given."""
    name = name or path.name
    value = _read(path, max_bytes, name)
    if not isinstance(value, dict):
        raise _unreadable(name, "not an object")
    return value


def read_json_list(path: Path, *, name: str) -> list[Any]:
    """A JSON list; raises InvalidArgument (CORRUPT_CONFIG) that names the file."""
    value = _read(path, _MAX_JSON, name)
    if not isinstance(value, list):
        raise _unreadable(name, "not a list")
    return value


def _read(path: Path, max_bytes: int, name: str) -> object:
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"larger than {max_bytes} bytes")
        content = path.read_bytes()
        value: object = json.loads(content)
        # Half a character cannot be written again; a whole one in two halves can.
        if _HALF_CHARACTER.search(content):
            json_bytes(value)
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{name} has half a character ({error.object[error.start]!r}); escape whole ones",
            reason="CORRUPT_CONFIG",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, str(error)) from error
    return value


def _unreadable(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name} cannot be read: {why}; take the model's own file", reason="CORRUPT_CONFIG"
    )
