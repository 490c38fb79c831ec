"""What can be asked for now: the profiles that workers have ready, under the names that lead to them; and
those that should be, with what is in the way."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from treadle.deployments import KnownModels
from treadle.errors import TreadleError, invalid_field
from treadle_gateway.artifact import TaskFacts
from treadle_gateway.clients import Registry
from treadle_gateway.models import ARTIFACT_FRESH_S, Loaded

DEFAULT_PAGE = 50
MAX_PAGE = 1000
_MAX_TOKEN = 4096
"""A name and a profile as JSON; what is longer was not made here, and is not parsed."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A name, and a profile that answers to it."""

    model: str
    artifact_digest: str
    profile: str
    max_model_len: int
    vocab_size: int
    ready_workers: int
    error: TreadleError | None = None
    """Where none is ready: why it could not be loaded."""
    facts: TaskFacts | None = None
    """What can be asked of it; None: the registry has not said."""


class Aliases:
    """Every alias of the registry: as its watch says it, or else fresh for a while; kept when it is away."""

    def __init__(
        self,
        registry: Registry,
        *,
        timeout_s: float,
        watched: Callable[[], KnownModels | None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._watched = watched
        self._timeout_s = timeout_s
        self._known: list[tuple[str, str]] | None = None
        self._fresh_until = 0.0

    async def read(self, loaded: Iterable[Loaded]) -> list[tuple[str, str]]:
        """Aliases with the digests of the artifacts that answer for them; what the workers call them where
        nothing else is known."""
        watched = self._watched()
        if watched is not None:
            return _pairs(watched)
        if self._known is None or time.monotonic() >= self._fresh_until:
            try:
                self._known = [pair async for pair in self._registry.aliases(timeout_s=self._timeout_s)]
            except TreadleError:
                if self._known is None:
                    return list({(one.model_name, one.artifact_digest) for one in loaded if one.model_name})
            self._fresh_until = time.monotonic() + ARTIFACT_FRESH_S
        return self._known


def _pairs(known: KnownModels) -> list[tuple[str, str]]:
    pairs = [(name, digest) for name, digest in known.aliases.items() if name not in known.deployments]
    for alias, deployment in known.deployments.items():
        pairs += [(alias, target.artifact_digest) for target in deployment.serving]
    return pairs


def list_served(loaded: Iterable[Loaded], aliases: Iterable[tuple[str, str]]) -> list[Listed]:
    """One line for each name and profile that a worker has ready or could not load; an artifact without an
    alias stands under its digest.

    `aliases` are names with their artifacts' digests.
    """
    names: dict[str, list[str]] = {}
    for alias, digest in aliases:
        names.setdefault(digest, []).append(alias)
    workers: dict[tuple[str, str], list[Loaded]] = {}
    for one in loaded:
        if one.ready or one.error is not None:
            workers.setdefault((one.artifact_digest, one.profile), []).append(one)
    lines = [
        _line(name, digest, profile, having)
        for (digest, profile), having in workers.items()
        for name in _names(digest, names)
    ]
    return sorted(lines, key=_key)


def _line(name: str, digest: str, profile: str, having: Sequence[Loaded]) -> Listed:
    ready = [one for one in having if one.ready]
    return Listed(
        model=name,
        artifact_digest=digest,
        profile=profile,
        max_model_len=min((one.max_model_len for one in ready), default=0),
        vocab_size=min((one.vocab_size for one in ready), default=0),
        ready_workers=len(ready),
        error=None if ready else having[0].error,
    )


def _names(digest: str, aliases: Mapping[str, Sequence[str]]) -> Sequence[str]:
    return aliases.get(digest) or [digest]


def _key(line: Listed) -> tuple[str, str]:
    return line.model, line.profile


def page(lines: Sequence[Listed], size: int, token: str) -> tuple[list[Listed], str]:
    """Up to `size` lines (0: DEFAULT_PAGE) after the token's, and the next token ("": the end).

    Raises InvalidArgument for a negative size, and for a token that this did not make.
    """
    if size < 0:
        raise invalid_field("page_size", f"must be 0 to {MAX_PAGE}; got {size}. 0 is {DEFAULT_PAGE}")
    after = _decode(token) if token else ("", "")
    rest = [line for line in lines if _key(line) > after]
    size = min(size or DEFAULT_PAGE, MAX_PAGE)
    shown = rest[:size]
    return shown, _encode(_key(shown[-1])) if len(rest) > size else ""


def _encode(key: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def _decode(token: str) -> tuple[str, str]:
    try:
        if len(token) > _MAX_TOKEN:
            raise ValueError("longer than any token")
        model, profile = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        return str(model), str(profile)
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise invalid_field(
            "page_token", "is no token of this list; send next_page_token as it came, or none"
        ) from error
