"""The hub through `huggingface_hub`: its session, its headers, its addresses and its settings.

Of the client's own downloads only the parts are used. Version 2.4 throws a partial file away when a download
ends early, and compares no hash; see `hub_download`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from treadle import __version__
from treadle.errors import FailedPrecondition, InvalidArgument, Unavailable
from treadle.transfer.file_names import is_model_file
from treadle_registry.config import HubConfig
from treadle_registry.sources.hub_errors import hub_errors, not_a_hub
from treadle_registry.sources.hub_source import HubSource

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_TALKATIVE = ("httpx", "httpx2", "httpcore", "httpcore2")
_MAX_LISTED = 100_000
_MAX_TOKEN = 4096
_PAUSES_S = (0.3, 1.0)
"""After an attempt that failed; then comes the last one."""
_LIBRARY = "treadle"
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A whole one; git's names of files have the same form."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def git_hash(size: int) -> hashlib._Hash:
    """Begins git's hash of a file of `size` bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it."""

    size: int
    """Bytes."""
    sha256: str
    """Empty for a file of git's."""
    git_sha1: str
    """Git's name of the file's content, or of the pointer to it."""

    @property
    def etag(self) -> str:
        """The name of its blob in the cache."""
        return self.sha256 or self.git_sha1

    @property
    def digest(self) -> str:
        """What `new_hash` must find: the algorithm's name, a colon, and hexadecimal digits."""
        return f"sha256:{self.sha256}" if self.sha256 else f"sha1:{self.git_sha1}"

    def new_hash(self) -> hashlib._Hash:
        """Begins the hash that the hub names the content by."""
        return hashlib.sha256() if self.sha256 else git_hash(self.size)


@dataclass(frozen=True, slots=True)
class Listing:
    """A commit's files at the top of the repository, and those of its folders that may belong to a model."""

    commit: str
    files: dict[str, HubFile]


class HubClient:
    """The hub of HF_ENDPOINT, or another one for tests."""

    def __init__(
        self,
        token: str | None = None,
        *,
        token_file: Path | None = None,
        endpoint: str | None = None,
        cache: Path | None = None,
    ) -> None:
        """Without a token the client's own ways hold: HF_TOKEN, HF_TOKEN_PATH, `hf auth login`."""
        # They log whole addresses, and those of a hub's files carry a signature that opens them.
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._token, self._token_file = token, token_file
        self.endpoint = endpoint or constants.ENDPOINT
        self.cache = cache or Path(constants.HF_HUB_CACHE)
        """The folder of the Hugging Face cache that has the repositories."""

    @classmethod
    def of(cls, config: HubConfig) -> HubClient:
        """By the registry's settings."""
        return cls(token_file=config.token_file)

    @functools.cached_property
    def _credential(self) -> str | Literal[False]:
        """The token that goes with every call, or False for none; found before any call is made.

        Raises FailedPrecondition (HUB_TOKEN_UNREADABLE).
        """
        where = str(self._token_file or f"HF_TOKEN or {constants.HF_TOKEN_PATH}")
        try:
            token = self._found_token()
        except (OSError, ValueError) as error:
            raise _unreadable(where) from error
        if token is None:
            return False
        if not token or not token.isascii() or not token.isprintable():
            raise _unreadable(where)
        return token

    def _found_token(self) -> str | None:
        if self._token is not None:
            return self._token
        if self._token_file is not None:
            with self._token_file.open() as file:
                return file.read(_MAX_TOKEN).strip()
        return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()

    @property
    def offline(self) -> bool:
        """HF_HUB_OFFLINE, as the client reads it."""
        return constants.is_offline_mode()

    def listing(self, source: HubSource) -> Listing:
        """What the revision has. Raises TreadleError: see `hub_errors`."""
        for pause_s in _PAUSES_S:
            with contextlib.suppress(Unavailable):
                return self._listing(source)
            time.sleep(pause_s)
        return self._listing(source)

    def _listing(self, source: HubSource) -> Listing:
        api = HfApi(
            endpoint=self.endpoint, token=self._credential, library_name=_LIBRARY, library_version=__version__
        )
        try:
            with hub_errors(self.endpoint, source):
                info = api.model_info(
                    source.repository,
                    revision=source.wanted_revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise not_a_hub(self.endpoint, type(error).__name__) from error
        if not info.sha or not COMMIT.fullmatch(info.sha):
            raise not_a_hub(self.endpoint, "no commit")
        siblings = info.siblings or []
        if len(siblings) > _MAX_LISTED:
            raise InvalidArgument(
                f"{source.repository} has {len(siblings)} files; at most {_MAX_LISTED} are looked at",
                reason="TOO_MANY_FILES",
            )
        # Of what lies in the repository's own folders only some is a part of the model at its top.
        return Listing(
            info.sha,
            {entry.rfilename: self._file(entry) for entry in siblings if is_model_file(entry.rfilename)},
        )

    def _file(self, entry: RepoSibling) -> HubFile:
        sha256 = entry.lfs.sha256 if entry.lfs else ""
        size = entry.lfs.size if entry.lfs else entry.size
        if type(size) is not int or size < 0 or not entry.blob_id:
            raise not_a_hub(self.endpoint, "a file without size and digest")
        if not (_SHA256 if sha256 else COMMIT).fullmatch(sha256 or entry.blob_id):
            raise not_a_hub(self.endpoint, "a digest that is none")
        return HubFile(size, sha256, entry.blob_id)

    @contextlib.contextmanager
    def bytes_of(
        self, source: HubSource, commit: str, name: str, start: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file's bytes from `start` up to `end`, as they come, after the byte that they begin at.

        A server that ignores the range begins at 0. Errors of the transport, also while the bytes are read
        within the block, become TreadleError. A read that nothing comes from ends after
        HF_HUB_DOWNLOAD_TIMEOUT seconds.
        """
        url = hf_hub_url(source.repository, name, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self._credential, library_name=_LIBRARY, library_version=__version__)
        # Sizes and hashes are those of what is stored, not of what is packed for the way.
        headers["Accept-Encoding"] = "identity"
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        with (
            hub_errors(self.endpoint, source, name),
            get_session().stream(
                "GET",
                url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True,
            ) as response,
        ):
            hf_raise_for_status(response)
            yield start if response.status_code == 206 else 0, response.iter_bytes()


def _unreadable(where: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the hub's token cannot be read from {where}: it must be one line that the registry may read; look "
        "at TREADLE_REGISTRY_HUB_TOKEN_FILE and HF_TOKEN_PATH",
        reason="HUB_TOKEN_UNREADABLE",
    )
