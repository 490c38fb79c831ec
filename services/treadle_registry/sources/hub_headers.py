"""What a hub's repository is, from headers alone: texts whole, and of weights what stands before them.

Weights become sparse files of their full size whose headers are right and whose tensors are holes, so that
whatever reads headers of files reads these. Nothing goes into the hub's cache.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from treadle.errors import InvalidArgument, Unavailable
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.sources.hub_cached import cached_files
from treadle_registry.sources.hub_client import HubClient, Listing
from treadle_registry.sources.hub_errors import UNREACHABLE
from treadle_registry.sources.hub_files import (
    MAX_TEXT,
    check_shards,
    is_index,
    text_files,
    weight_names,
    weights_file,
)
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.opened import ModelFiles

_FIRST_READ = 256 << 10
"""Of a file of weights: most headers are shorter."""
_LONGEST_HEADER = 128 << 20
_ALL_HEADERS = 512 << 20
"""Of all files of one model together."""


@contextlib.contextmanager
def hub_headers(source: HubSource, client: HubClient) -> Iterator[ModelFiles]:
    """The headers of a repository, in a folder that goes at the block's end; blocks while they come.

    Nothing is refused for what it says: a model that cannot be imported can be looked at, and config.json may
    be missing. Where nothing may leave the machine these are the cache's own files. Raises TreadleError for a
    hub that does not answer, and where there are no weights that could be read.
    """
    if source.local_files_only or client.offline:
        yield cached_files(source, client, whole=False)
        return
    with tempfile.TemporaryDirectory(prefix="treadle-headers-") as folder:
        yield _HeaderReader(source, client, client.listing(source), Path(folder)).read()


class _HeaderReader:
    """Fetches what `hub_headers` gives."""

    def __init__(self, source: HubSource, client: HubClient, listing: Listing, folder: Path) -> None:
        self._source, self._client, self._listing, self._folder = source, client, listing, folder
        self._left = _ALL_HEADERS

    def read(self) -> ModelFiles:
        """The texts and the headers."""
        listed = self._listing.files
        chosen = weights_file(self._source, listed)
        texts = [] if self._source.gguf_file else text_files(listed)
        if is_index(chosen):
            texts.append(chosen)
        files = {name: self._text(name) for name in texts}
        weights = weight_names(chosen, files)
        check_shards(weights, chosen, listed)
        for name in weights:
            files[name] = self._gguf(name) if name.endswith(".gguf") else self._safetensors(name)
        return ModelFiles(self._source.at(self._listing.commit), files, weights)

    def _text(self, name: str) -> Path:
        size = self._listing.files[name].size
        if size > MAX_TEXT:
            raise InvalidArgument(f"{name} is larger than {MAX_TEXT} bytes", reason="FILE_TOO_LARGE")
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self._read(name, 0, size))
        return path

    def _safetensors(self, name: str) -> Path:
        size = self._listing.files[name].size
        data = self._read(name, 0, min(size, _FIRST_READ))
        # What the length claims is judged by who reads the header; here it is only bounded.
        due = min(8 + int.from_bytes(data[:8], "little"), size, _LONGEST_HEADER)
        if due > len(data):
            data += self._read(name, len(data), due)
        return self._sparse(name, data)

    def _gguf(self, name: str) -> Path:
        """Its header does not say how long it is: more is read until a parse ends within what came."""
        size = self._listing.files[name].size
        data, due = b"", _FIRST_READ
        while True:
            due = min(due, size, _LONGEST_HEADER)
            data += self._read(name, len(data), due)
            path = self._sparse(name, data)
            try:
                with GgufFile(path, only_converted=False) as file:
                    if file.header_bytes <= len(data) or due in (size, _LONGEST_HEADER):
                        return path
            except InvalidArgument as error:
                # Holes parse as something, or as nothing.
                if error.reason != "CORRUPT_GGUF" or due in (size, _LONGEST_HEADER):
                    raise
            due *= 4

    def _sparse(self, name: str, data: bytes) -> Path:
        path = self._folder / name
        with path.open("wb") as file:
            file.write(data)
            file.truncate(self._listing.files[name].size)
        return path

    def _read(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a range, once asked for again where the answer broke off."""
        if start >= end:
            return b""
        self._left -= end - start
        if self._left < 0:
            raise InvalidArgument(
                f"the headers of {self._source.repository} have more than {_ALL_HEADERS} bytes; import the "
                "model to look at it",
                reason="HEADER_TOO_LARGE",
            )
        with contextlib.suppress(Unavailable):
            return self._read_once(name, start, end)
        return self._read_once(name, start, end)

    def _read_once(self, name: str, start: int, end: int) -> bytes:
        with self._client.bytes_of(self._source, self._listing.commit, name, start, end) as (begin, pieces):
            data = bytearray()
            for piece in pieces:
                data += piece
                # A server that ignores ranges sends everything: no more than is wanted is taken.
                if len(data) >= end - begin:
                    break
        found = bytes(data[start - begin : end - begin])
        if len(found) != end - start:
            raise Unavailable(f"the hub's answer for {name} ended early; try again", reason=UNREACHABLE)
        return found
