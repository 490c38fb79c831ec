"""A model out of the Hugging Face cache alone: nothing leaves the machine."""

from __future__ import annotations

import re
from pathlib import Path

from treadle.errors import InvalidArgument, NotFound
from treadle_registry.sources.hub_cache import HubCache
from treadle_registry.sources.hub_client import COMMIT, HubClient
from treadle_registry.sources.hub_files import is_index, required, text_files, weight_names, weights_file
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.opened import ModelFiles

_SHA256 = re.compile(r"[0-9a-f]{64}")


def cached_files(source: HubSource, client: HubClient, *, whole: bool = True) -> ModelFiles:
    """What the cache has of a model; raises NotFound (FILE_NOT_CACHED) that names what is missing.

    `whole`: its configuration and tokenizer are needed, too.

    The client's own functions are not asked with local_files_only: they would still fetch a list of programs
    that use them (`/api/agent-harnesses`), unless HF_HUB_OFFLINE says not to.
    """
    cache = HubCache(client.cache, source.repository)
    commit = cache.commit_of(source.wanted_revision)
    if commit is None:
        raise _not_cached(source, cache, f"revision {source.wanted_revision!r}")

    def need(name: str) -> Path:
        path = cache.cached(commit, name)
        if path is None:
            raise _not_cached(source, cache, name)
        return path

    if source.gguf_file:
        weights: tuple[str, ...] = (source.gguf_file,)
        files = {source.gguf_file: need(source.gguf_file)}
    else:
        names = cache.names(commit)
        files = {name: need(name) for name in {*(required(names) if whole else ()), *text_files(names)}}
        try:
            chosen = weights_file(source, names)
        except (NotFound, InvalidArgument):
            what = (
                f"weights of the variant {source.variant!r}"
                if source.variant
                else "model.safetensors or index"
            )
            raise _not_cached(source, cache, what) from None
        if is_index(chosen):
            files[chosen] = need(chosen)
        weights = weight_names(chosen, files)
        files |= {name: need(name) for name in weights}
    sha256 = {name: digest for name, path in files.items() if (digest := _named_sha256(path))}
    return ModelFiles(source.at(commit), files, weights, sha256)


def _named_sha256(path: Path) -> str:
    """The hash that the link of a snapshot names. What that may link to in turn is named by another kind."""
    if not path.is_symlink():
        return ""
    name = path.readlink().name
    return name if _SHA256.fullmatch(name) else ""


def _not_cached(source: HubSource, cache: HubCache, what: str) -> NotFound:
    revision = source.wanted_revision
    shortened = len(revision) < 40 and COMMIT.fullmatch(revision.ljust(40, "0"))
    whole = "; a commit is given whole" if shortened else ""
    return NotFound(
        f"the hub's cache ({cache.folder}) has no {what} of {source.repository}, and nothing may leave the "
        f"machine (HF_HUB_OFFLINE or local_files_only){whole}; import it once with the hub, or bring the "
        "folder here from a machine that has it",
        reason="FILE_NOT_CACHED",
        metadata={"file": what, "repository": source.repository, "revision": revision},
    )
