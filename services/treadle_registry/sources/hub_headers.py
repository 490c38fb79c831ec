"""What a hub's repository is, from headers alone: texts whole, and of weights what stands before them.

Weights become sparse files of their full size whose headers are right and whose tensors are holes, so that
whatever reads headers of files reads these. Nothing goes into the hub's cache.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import InvalidArgument, Unavailable
from treadle_registry.formats.gguf_model import GgufModel
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.formats.huggingface_folder import HuggingFaceFolder, check_config, read_json
from treadle_registry.sources.hub import MAX_INDEX, MAX_TEXT, is_index, open_hub
from treadle_registry.sources.hub_client import HubClient, Listing
from treadle_registry.sources.hub_errors import UNREACHABLE
from treadle_registry.sources.hub_files import check_shards, shards_of, text_files, weights_file
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.opened import OpenedSource, SourceModel

_FIRST_READ = 256 << 10
"""Of a file of weights: most headers are shorter."""
_LONGEST_HEADER = 128 << 20
_ALL_HEADERS = 512 << 20
"""Of all files of one model together."""


@dataclass(frozen=True, slots=True)
class HubHeaders:
    """A repository's files as far as they say what the model is."""

    origin: str
    """"hub:owner/name@commit"."""
    files: dict[str, Path]
    """Config, tokenizer, card and index whole; weights with their headers. Theirs are the true sizes."""
    weights: tuple[str, ...]
    """Which of the files are weights: safetensors, or one GGUF file."""
    sizes: dict[str, int]
    """Bytes of each file as the hub, or the cache, has it."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return self.weights[0].endswith(".gguf")

    def opened(self) -> OpenedSource:
        """The model that these files are, to be checked; its tensors have no values."""
        model: SourceModel = (
            GgufModel(self.files[self.weights[0]])
            if self.is_gguf
            else HuggingFaceFolder.of_files(self.files, self.weights)
        )
        return OpenedSource(model, self.origin)


@contextlib.contextmanager
def hub_headers(source: HubSource, client: HubClient) -> Iterator[HubHeaders]:
    """The headers of a repository, in a folder that goes at the block's end; blocks while they come.

    Where nothing may leave the machine, the cache's own files. Raises TreadleError as `open_hub` does.
    """
    if source.local_files_only or client.offline:
        opened = open_hub(source, client)
        files = dict(opened.model.files)
        weights = tuple(name for name in files if name.endswith((".safetensors", ".gguf")))
        yield HubHeaders(
            opened.origin, files, weights, {name: path.stat().st_size for name, path in files.items()}
        )
        return
    with tempfile.TemporaryDirectory(prefix="treadle-headers-") as folder:
        yield _HeaderReader(source, client, client.listing(source), Path(folder)).read()


class _HeaderReader:
    """Fetches what `hub_headers` gives."""

    def __init__(self, source: HubSource, client: HubClient, listing: Listing, folder: Path) -> None:
        self._source, self._client, self._listing, self._folder = source, client, listing, folder
        self._left = _ALL_HEADERS

    def read(self) -> HubHeaders:
        """Everything that is told without the weights is told first."""
        listed = self._listing.files
        chosen = weights_file(self._source, listed)
        texts = [] if self._source.gguf_file else text_files(listed)
        if is_index(chosen):
            texts.append(chosen)
        files = {name: self._text(name) for name in texts}
        if files:
            check_config(files)
        weights: tuple[str, ...] = (chosen,)
        if is_index(chosen):
            weights = shards_of(read_json(files[chosen], MAX_INDEX), chosen)
            check_shards(weights, chosen, listed)
        for name in weights:
            files[name] = self._gguf(name) if name.endswith(".gguf") else self._safetensors(name)
        sizes = {name: listed[name].size for name in files}
        return HubHeaders(self._source.at(self._listing.commit), files, weights, sizes)

    def _text(self, name: str) -> Path:
        size = self._listing.files[name].size
        if size > MAX_TEXT:
            raise InvalidArgument(f"{name} is larger than {MAX_TEXT} bytes", reason="FILE_TOO_LARGE")
        path = self._folder / name
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
                with GgufFile(path) as file:
                    if file.header_bytes <= len(data):
                        return path
            except InvalidArgument:
                # Holes parse as something, or as nothing.
                if due in (size, _LONGEST_HEADER):
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
