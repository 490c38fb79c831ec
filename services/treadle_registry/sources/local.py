"""Where a model comes from on this machine: a folder, a GGUF file, or an installed Python package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from treadle.errors import InvalidArgument, NotFound, PermissionDenied, invalid_field
from treadle_registry.formats.gguf_model import GgufModel
from treadle_registry.formats.huggingface_folder import HuggingFaceFolder
from treadle_registry.names import source_path
from treadle_registry.sources.opened import SourceModel
from treadle_registry.sources.source import LocalSource

_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")


def open_source(source: LocalSource) -> SourceModel:
    """Finds the source's files, without reading much of them.

    Raises InvalidArgument that names the source's field, NotFound for a package that is not installed, and
    PermissionDenied.
    """
    try:
        model = _find(source)
        for path in model.files.values():
            path.open("rb").close()
    except PermissionError as error:
        raise PermissionDenied(
            f"the registry may not read {error.filename}", reason="SOURCE_NOT_READABLE"
        ) from error
    return model


def _find(source: LocalSource) -> SourceModel:
    if source.kind == "package":
        return _open_package(source.value)
    path = source_path(source.value, source.kind)
    if source.kind == "folder":
        if not path.is_dir():
            raise invalid_field("folder", f"{source.value} is not a folder; give a .gguf as gguf_file")
        return HuggingFaceFolder(path)
    if not path.is_file():
        raise invalid_field("gguf_file", f"{source.value} is not a file; give a folder as folder")
    return GgufModel(path)


def _open_package(name: str) -> SourceModel:
    if not _PACKAGE.fullmatch(name):
        raise invalid_field("package", f"must be a package's name, as pip has it; got {name[:100]!r}")
    files = _package_files(name)
    folders = {path.parent for path in files if path.suffix == ".safetensors"}
    folders &= {path.parent for path in files if path.name == "config.json"}
    candidates = sorted({path for path in files if path.suffix == ".gguf"} | folders)
    if len(candidates) != 1:
        found = ", ".join(path.name for path in candidates[:5]) or "none"
        raise InvalidArgument(
            f"the package {name} must have one GGUF file or one folder with config.json and safetensors; "
            f"found: {found}",
            reason="NO_MODEL_IN_PACKAGE",
        )
    (model,) = candidates
    return GgufModel(model) if model.suffix == ".gguf" else HuggingFaceFolder(model)


def _package_files(name: str) -> list[Path]:
    """Files of a distribution, or of an importable package of that name. Nothing is imported."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        spec = None if "." in name or "-" in name else importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise NotFound(
                f"no package {name!r} is installed on the registry's machine; pip install it first",
                reason="PACKAGE_NOT_FOUND",
            ) from None
        roots = [Path(root) for root in spec.submodule_search_locations]
        return [path for root in roots for path in root.rglob("*") if path.is_file()]
    recorded = [entry for entry in distribution.files or () if ".." not in entry.parts]
    return [path for entry in recorded if (path := Path(str(distribution.locate_file(entry)))).is_file()]
