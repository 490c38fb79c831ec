"""Uploaded files as a model to import: a folder of second names for them, as long as it is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from treadle.errors import NotFound
from treadle_registry.sources.local import open_source
from treadle_registry.sources.opened import OpenedSource
from treadle_registry.sources.source import LocalSource
from treadle_registry.sources.uploaded_source import UploadedSource
from treadle_registry.store.staging import disk_errors
from treadle_registry.store.store import Store
from treadle_registry.store.uploads import Uploads


@contextlib.contextmanager
def open_uploaded(store: Store, source: UploadedSource) -> Iterator[OpenedSource]:
    """The model, until the block ends.

    Raises NotFound (UPLOAD_NOT_FOUND) for a file that was never brought whole, or more than a day ago, and
    what is wrong with the model.
    """
    with disk_errors("the uploaded files' names"), store.staging() as staging:
        folder = staging.folder / "uploaded"
        folder.mkdir()
        for name, digest in source.files:
            _name(store, digest, folder / name)
        (first, _), *others = source.files
        if first.endswith(".gguf") and not others:
            local = LocalSource("gguf_file", str(folder / first))
        else:
            local = LocalSource("folder", str(folder))
        digits = {name: digest.removeprefix("sha256:") for name, digest in source.files}
        yield OpenedSource(open_source(local), str(source), linked=True, sha256=digits)


def _name(store: Store, digest: str, path: Path) -> None:
    """Gives the content of a digest a name, whether it waits for an import or an artifact has it."""
    path.parent.mkdir(exist_ok=True)
    for place in (Uploads(store).path(digest), store.blob_path(digest)):
        with contextlib.suppress(FileNotFoundError):
            os.link(place, path)
            return
    raise NotFound(
        f"{path.name} ({digest}) is not here: upload it, again if that was more than a day ago",
        reason="UPLOAD_NOT_FOUND",
        metadata={"file": path.name, "digest": digest},
    )
