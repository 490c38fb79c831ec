"""Values of a config.json, each checked as it is read; what every configuration shares. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from treadle.errors import FailedPrecondition, InvalidArgument

MAX_CONFIG_BYTES = 1 << 20
MAX_LAYERS = 1024
_MAX_DIMENSION = 1 << 24


def read_raw(folder: Path) -> object:
    """The decoded config.json of a folder; raises InvalidArgument (CORRUPT_CONFIG)."""
    path = folder / "config.json"
    try:
        text = path.read_bytes()[: MAX_CONFIG_BYTES + 1]
    except OSError as error:
        raise InvalidArgument(
            f"{path.name} cannot be read: {error.strerror}", reason="CORRUPT_CONFIG"
        ) from error
    if len(text) > MAX_CONFIG_BYTES:
        raise InvalidArgument(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes", reason="CORRUPT_CONFIG")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path.name} is not JSON: {error}", reason="CORRUPT_CONFIG") from error


def model_of(raw: object, supported: Collection[str]) -> tuple[str, Mapping[str, Any]]:
    """The `model_type`, one of `supported`, and the object that config.json is.

    Raises InvalidArgument (CORRUPT_CONFIG), and FailedPrecondition (REMOTE_CODE, UNSUPPORTED_ARCHITECTURE)
    with what is supported.
    """
    if not isinstance(raw, Mapping):
        raise corrupt("config.json", "must be an object")
    if "auto_map" in raw:
        raise FailedPrecondition(
            "config.json asks for remote code (auto_map), which is never run; supported model types: "
            + ", ".join(supported),
            reason="REMOTE_CODE",
        )
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in supported:
        raise unsupported(f"model_type {model_type!r:.80}; supported: {', '.join(supported)}")
    return model_type, raw


def size(
    raw: Mapping[str, Any],
    name: str,
    largest: int = _MAX_DIMENSION,
    default: int | None = None,
    smallest: int = 1,
) -> int:
    """A whole number from `smallest` to `largest`; null counts as left out."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise corrupt(name, f"must be a whole number from {smallest} to {largest}; got {value!r:.80}")
    return value


def number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise corrupt(name, f"must be a number above 0; got {value!r:.80}")
    return float(value)


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """True or false; left out: false."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise corrupt(name, f"must be true or false; got {value!r:.80}")
    return bool(value)


def corrupt(name: str, problem: str) -> InvalidArgument:
    """The error of a value that cannot be."""
    return InvalidArgument(f"config.json: {name} {problem}", reason="CORRUPT_CONFIG")


def unsupported(what: str) -> FailedPrecondition:
    """The error of what no code here computes."""
    return FailedPrecondition(f"unsupported {what}", reason="UNSUPPORTED_ARCHITECTURE")
