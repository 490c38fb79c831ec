"""A source, looked at: its files found leniently, and what an import would say of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from treadle.errors import PermissionDenied, TreadleError
from treadle_registry.config import HubConfig
from treadle_registry.formats.canonical import check_parts, task_facts_of
from treadle_registry.formats.huggingface_folder import inner_files, kept_names, weight_files
from treadle_registry.formats.inspection import Inspection, inspect_gguf, inspect_safetensors
from treadle_registry.names import file_inside
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.local import find_source, open_source
from treadle_registry.sources.opened import SourceModel
from treadle_registry.sources.source import LocalSource, LookedAt

_MOST_TEXTS = 1024


def inspect_source(source: LookedAt, hub: HubConfig | None = None) -> Inspection:
    """What the source's model is; headers alone are read, and of a hub's repository fetched.

    Raises what an import raises where there is nothing to look at: no such file, no config.json, a header
    that cannot be read. What an import would refuse for another reason is described with its refusal.
    """
    return _local(source) if isinstance(source, LocalSource) else _of_hub(source, hub or HubConfig())


def _of_hub(source: HubSource, hub: HubConfig) -> Inspection:
    # A quarter of a second, which the others need not spend.
    from treadle_registry.sources.hub_client import HubClient
    from treadle_registry.sources.hub_files import check_required
    from treadle_registry.sources.hub_headers import hub_headers

    with hub_headers(source, HubClient.of(hub)) as headers:
        sizes = {name: path.stat().st_size for name, path in headers.files.items()}
        if headers.is_gguf:
            (name,) = headers.weights
            found = inspect_gguf(headers.files[name], name, sizes[name])
        else:
            check_required((*headers.files, "tokenizer.json"))
            found = inspect_safetensors(headers.files, headers.weights, sizes)

        def opened() -> SourceModel:
            if not headers.is_gguf:
                check_required(headers.files)
            return headers.opened(linked=False).model

        return with_refusal(found, opened)


def _local(source: LocalSource) -> Inspection:
    path = find_source(source)
    try:
        found = _inspect_folder(path) if path.is_dir() else inspect_gguf(path, path.name, path.stat().st_size)
    except PermissionError as error:
        raise PermissionDenied(
            f"the registry may not read {error.filename}", reason="SOURCE_NOT_READABLE"
        ) from error
    return with_refusal(found, lambda: open_source(source))


def with_refusal(inspection: Inspection, open_model: Callable[[], SourceModel]) -> Inspection:
    """The inspection with what can be asked of the model, or why an import would refuse it."""
    try:
        parts = open_model().check()
        check_parts(parts)
    except TreadleError as error:
        return replace(inspection, refusal=error)
    return replace(inspection, task_facts=task_facts_of(parts))


def _inspect_folder(folder: Path) -> Inspection:
    """What is missing or leads elsewhere is left out, and is the refusal's to tell."""
    files = {"config.json": file_inside(folder, "config.json")}
    weights: tuple[str, ...] = ()
    with contextlib.suppress(TreadleError):
        weights = weight_files(folder)
    for name in (*weights, *sorted(kept_names(folder))[:_MOST_TEXTS]):
        with contextlib.suppress(TreadleError):
            files[name] = file_inside(folder, name)
    with contextlib.suppress(TreadleError):
        files |= inner_files(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return inspect_safetensors(files, weights, sizes)
