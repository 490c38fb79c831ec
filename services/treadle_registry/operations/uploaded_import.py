"""An import of uploaded files."""

from __future__ import annotations

from treadle.errors import DataLoss
from treadle_registry.operations.importing import check_opened, import_opened
from treadle_registry.operations.progress import Progress, Report, Stage, unheard
from treadle_registry.sources.uploaded import open_uploaded
from treadle_registry.sources.uploaded_source import UploadedSource
from treadle_registry.store.manifest import Manifest
from treadle_registry.store.store import Published, Store
from treadle_registry.store.uploads import Uploads


def check_uploaded(store: Store, source: UploadedSource) -> Manifest:
    """What the import would give; the files stay uploaded."""
    with open_uploaded(store, source) as opened:
        return check_opened(opened)


def import_uploaded(store: Store, source: UploadedSource, report: Report = unheard) -> Published:
    """Imports the files, which are uploads no longer then; raises as `import_source` does, and NotFound.

    Content that is not what its digest says is DataLoss (CHECKSUM_MISMATCH), and no upload any more either.
    """
    report(Progress(Stage.CHECKING))
    uploads = Uploads(store)
    try:
        with open_uploaded(store, source) as opened:
            published = import_opened(store, opened, report)
    except DataLoss as error:
        if error.reason != "CHECKSUM_MISMATCH":
            raise
        name = error.metadata["file"]
        uploads.forget(dict(source.files)[name])
        raise DataLoss(
            f"{name} is damaged since it was uploaded; upload it again",
            reason=error.reason,
            metadata={"file": name, "expected_digest": dict(source.files)[name]},
        ) from error
    for _, digest in source.files:
        uploads.forget(digest)
    return published
