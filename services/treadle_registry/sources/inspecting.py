"""A source on this machine, looked at: its files found leniently, and what an import would say of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from treadle.errors import PermissionDenied, TreadleError, Unimplemented
from treadle_registry.formats.canonical import check_parts
from treadle_registry.formats.huggingface_folder import kept_names, weight_files
from treadle_registry.formats.inspection import Inspection, inspect_gguf, inspect_safetensors
from treadle_registry.names import file_inside
from treadle_registry.sources.local import SourceModel, find_source, open_source
from treadle_registry.sources.source import LocalSource, Source

_MOST_TEXTS = 1024


def inspect_source(source: Source) -> Inspection:
    """What the source's model is; headers alone are read.

    Raises what an import raises where there is nothing to look at: no such file, no config.json, a header
    that cannot be read. What an import would refuse for another reason is described with its refusal.
    """
    if not isinstance(source, LocalSource):
        raise Unimplemented(f"models are not inspected in a {source.kind} yet")
    path = find_source(source)
    try:
        found = _inspect_folder(path) if path.is_dir() else inspect_gguf(path, path.name, path.stat().st_size)
    except PermissionError as error:
        raise PermissionDenied(
            f"the registry may not read {error.filename}", reason="SOURCE_NOT_READABLE"
        ) from error
    return with_refusal(found, lambda: open_source(source))


def with_refusal(inspection: Inspection, open_model: Callable[[], SourceModel]) -> Inspection:
    """The inspection, and why an import would refuse the model, where it would."""
    try:
        check_parts(open_model().check())
    except TreadleError as error:
        return replace(inspection, refusal=error)
    return inspection


def _inspect_folder(folder: Path) -> Inspection:
    """What is missing or leads elsewhere is left out, and is the refusal's to tell."""
    files = {"config.json": file_inside(folder, "config.json")}
    weights: tuple[str, ...] = ()
    with contextlib.suppress(TreadleError):
        weights = weight_files(folder)
    for name in (*weights, *sorted(kept_names(folder))[:_MOST_TEXTS]):
        with contextlib.suppress(TreadleError):
            files[name] = file_inside(folder, name)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return inspect_safetensors(files, weights, sizes)
