"""A model of a Hugging Face hub, as files of the Hugging Face cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from treadle.errors import InvalidArgument, NotFound
from treadle_registry.formats.gguf_model import GgufModel
from treadle_registry.formats.huggingface_folder import HuggingFaceFolder, check_config, read_json
from treadle_registry.operations.progress import Report, unheard
from treadle_registry.sources.hub_cache import HubCache
from treadle_registry.sources.hub_client import COMMIT, HubClient
from treadle_registry.sources.hub_download import HubDownload
from treadle_registry.sources.hub_files import check_shards, shards_of, text_files, weights_file
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.opened import OpenedSource, SourceModel

MAX_INDEX = 16 << 20
MAX_TEXT = 256 << 20
"""Bytes of a file that is no file of weights."""


def is_index(name: str) -> bool:
    """Whether what `weights_file` chose is an index of shards."""
    return name.endswith(".json")


def open_hub(source: HubSource, client: HubClient, report: Report = unheard) -> OpenedSource:
    """Brings what the cache lacks of the model, or takes what it has where nothing may leave the machine.

    Everything that can be told without the weights is told before they are fetched. Raises TreadleError; what
    has come by then stays in the cache.
    """
    if source.local_files_only or client.offline:
        return _open_cached(source, client)
    listing = client.listing(source)
    download = HubDownload(client, source, listing, report)
    chosen = weights_file(source, listing.files)
    first = [] if source.gguf_file else text_files(listing.files)
    if is_index(chosen):
        first.append(chosen)
    for name in first:
        if listing.files[name].size > MAX_TEXT:
            raise InvalidArgument(f"{name} is larger than {MAX_TEXT} bytes", reason="FILE_TOO_LARGE")
    files = download.fetch(first)
    if files:
        check_config(files)
    weights = _weights(chosen, files)
    check_shards(weights, chosen, listing.files)
    files |= download.fetch(weights)
    return OpenedSource(
        _model(source, files, weights),
        source.at(listing.commit),
        linked=True,
        sha256={name: listing.files[name].sha256 for name in files if listing.files[name].sha256},
    )


def _weights(chosen: str, files: Mapping[str, Path]) -> tuple[str, ...]:
    return shards_of(read_json(files[chosen], MAX_INDEX), chosen) if is_index(chosen) else (chosen,)


def _model(source: HubSource, files: Mapping[str, Path], weights: tuple[str, ...]) -> SourceModel:
    if source.gguf_file:
        return GgufModel(files[source.gguf_file])
    return HuggingFaceFolder.of_files(files, weights)


def _open_cached(source: HubSource, client: HubClient) -> OpenedSource:
    """The model out of the cache alone. Raises NotFound (FILE_NOT_CACHED) that names what is missing."""
    cache = HubCache(client.cache, source.repository)
    commit = cache.commit_of(source.wanted_revision)
    if commit is None:
        raise _not_cached(source, cache, f"revision {source.wanted_revision!r}")
    names = cache.names(commit)
    weights: tuple[str, ...] = (source.gguf_file,)

    def need(name: str) -> Path:
        path = cache.cached(commit, name)
        if path is None:
            raise _not_cached(source, cache, name)
        return path

    if source.gguf_file:
        files = {source.gguf_file: need(source.gguf_file)}
    else:
        need("config.json")
        need("tokenizer.json")
        files = {name: need(name) for name in text_files(names)}
        try:
            chosen = weights_file(source, names)
        except (NotFound, InvalidArgument):
            raise _not_cached(source, cache, _weights_said(source)) from None
        if is_index(chosen):
            files[chosen] = need(chosen)
        weights = _weights(chosen, files)
        files |= {name: need(name) for name in weights}
    sha256 = {name: blob for name, path in files.items() if len(blob := path.resolve().name) == 64}
    return OpenedSource(_model(source, files, weights), source.at(commit), linked=True, sha256=sha256)


def _weights_said(source: HubSource) -> str:
    return (
        f"weights of the variant {source.variant!r}" if source.variant else "model.safetensors or its index"
    )


def _not_cached(source: HubSource, cache: HubCache, what: str) -> NotFound:
    revision = source.wanted_revision
    short = (
        "; a commit is given whole"
        if len(revision) < 40 and COMMIT.fullmatch(revision.ljust(40, "0"))
        else ""
    )
    return NotFound(
        f"the hub's cache ({cache.folder}) has no {what} of {source.repository}, and nothing may leave the "
        f"machine (HF_HUB_OFFLINE or local_files_only){short}; import it once with the hub, or bring the "
        "folder here from a machine that has it",
        reason="FILE_NOT_CACHED",
        metadata={"file": what, "repository": source.repository, "revision": revision},
    )
