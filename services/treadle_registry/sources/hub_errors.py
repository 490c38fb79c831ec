"""What a hub answers, and that it does not, in the suite's errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from treadle.errors import (
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TreadleError,
    Unauthenticated,
    Unavailable,
)
from treadle_registry.sources.hub_source import HubSource

UNREACHABLE = "HUB_UNREACHABLE"
RATE_LIMITED = "HUB_RATE_LIMITED"
_RETRY_AFTER_S = 30.0
_LONGEST_RETRY_S = 3600.0
_AUTHENTICATE = (
    "put a token that may read it into HF_TOKEN, or into the file that HF_TOKEN_PATH or "
    "TREADLE_REGISTRY_HUB_TOKEN_FILE names"
)
_OFFLINE = "set HF_HUB_OFFLINE=1, or ask with local_files_only (--offline), to take what the cache has"


@contextlib.contextmanager
def hub_errors(endpoint: str, source: HubSource, file: str = "") -> Iterator[None]:
    """Turns the client's errors into TreadleError, each with a reason and a way out.

    Neither a token nor an address with its query gets into a message: only the hub's host does.
    """
    try:
        yield
    except HTTPError as error:
        raise _translated(error, _host(endpoint), source, file) from error


def not_a_hub(endpoint: str, what: str) -> Unavailable:
    """The error for an answer that no hub gives: of a proxy, or of a network that asks to log in."""
    return Unavailable(
        f"{_host(endpoint)} does not answer as a hub does ({what[:100]}); look at HF_ENDPOINT and at proxies",
        reason=UNREACHABLE,
        retry_after_s=_RETRY_AFTER_S,
    )


def _host(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _translated(error: HTTPError, host: str, source: HubSource, file: str) -> TreadleError:
    name = source.repository
    what = f"{file} of {name}" if file else name
    match error:
        case GatedRepoError():
            return _gated(error, name)
        case RevisionNotFoundError():
            return NotFound(
                f"{name} has no revision {source.wanted_revision!r} on {host}; give a branch, a tag or a "
                "whole commit",
                reason="REVISION_NOT_FOUND",
            )
        case RemoteEntryNotFoundError():
            return NotFound(
                f"{name} has no file {file} at {source.wanted_revision!r}; it may have changed meanwhile, "
                "import again",
                reason="HUB_FILE_NOT_FOUND",
            )
        case RepositoryNotFoundError():
            return NotFound(
                f"{host} has no repository {name}, or it is private: look at the name; for a private one "
                f"{_AUTHENTICATE}",
                reason="REPOSITORY_NOT_FOUND",
            )
        case DisabledRepoError():
            return FailedPrecondition(
                f"{host} has disabled the repository {name}; choose another one", reason="REPOSITORY_DISABLED"
            )
        case HfHubHTTPError():
            return _status(error, host, what)
    # Neither the address nor what the library says of it: the kind of the error is enough.
    return Unavailable(
        f"{host} cannot be reached ({type(error).__name__}); look at the network, HF_ENDPOINT and proxies; "
        f"{_OFFLINE}",
        reason=UNREACHABLE,
        retry_after_s=_RETRY_AFTER_S,
    )


def _gated(error: GatedRepoError, name: str) -> TreadleError:
    if error.response.status_code == 401:
        return Unauthenticated(
            f"{name} is gated: accept its conditions on its page on the hub, then {_AUTHENTICATE}",
            reason="GATED_REPOSITORY",
        )
    return PermissionDenied(
        f"{name} is gated and the token's owner is not on its list: ask for access on its page on the hub, "
        f"or {_AUTHENTICATE}",
        reason="GATED_REPOSITORY",
    )


def _status(error: HfHubHTTPError, host: str, what: str) -> TreadleError:
    status = error.response.status_code
    if status == 401:
        return Unauthenticated(f"{host} does not know the token; {_AUTHENTICATE}", reason="HUB_TOKEN_REFUSED")
    if status == 403:
        return PermissionDenied(
            f"{host} does not give {what} to the token's owner; {_AUTHENTICATE}", reason="HUB_ACCESS_DENIED"
        )
    if status == 429:
        after = _retry_after(error)
        return ResourceExhausted(
            f"{host} has had too many requests from here; try again in {after:g} s, or with a token, which "
            "raises the limit",
            reason=RATE_LIMITED,
            retry_after_s=after,
        )
    if status >= 500 or status == 408:
        return Unavailable(
            f"{host} answers {status} for {what}; try again later; {_OFFLINE}",
            reason=UNREACHABLE,
            retry_after_s=_RETRY_AFTER_S,
        )
    return FailedPrecondition(
        f"{host} refuses {what} with {status}; look at HF_ENDPOINT, proxies and the revision",
        reason="HUB_REFUSED",
    )


def _retry_after(error: HfHubHTTPError) -> float:
    """Seconds: what the hub says, within bounds."""
    text = error.response.headers.get("Retry-After", "")
    return min(float(text), _LONGEST_RETRY_S) if text.isdecimal() and len(text) < 9 else _RETRY_AFTER_S
