"""An import from end to end, in this process: find, check, copy, convert, publish."""

from __future__ import annotations

import shutil

from treadle.errors import DataLoss, FailedPrecondition, NotFound, ResourceExhausted
from treadle.models.stored_folder import StoredFile
from treadle_registry.formats.canonical import (
    check_parts,
    facts_of,
    generation_defaults,
    manifest_of,
    write_text_parts,
)
from treadle_registry.operations.progress import Progress, Report, Stage, StageMeter, unheard
from treadle_registry.sources.local import SourceModel, open_source
from treadle_registry.sources.source import LocalSource, Source
from treadle_registry.store.manifest import CONVERTER, Manifest
from treadle_registry.store.staging import Staging, disk_errors
from treadle_registry.store.store import Published, Store


def check_source(source: Source) -> Manifest:
    """What importing `source` would give, as far as can be said without converting; writes nothing."""
    model = open_source(source)
    parts = model.check()
    check_parts(parts)
    return Manifest(
        digests=None,
        facts=facts_of(parts),
        defaults=generation_defaults(parts.generation, parts.config),
        files=(),
        source_files=tuple(
            StoredFile(name, "", path.stat().st_size) for name, path in sorted(model.files.items())
        ),
        source=str(source),
        create_time=0.0,
    )


def import_source(store: Store, source: Source, report: Report = unheard) -> Published:
    """Imports `source` into `store` and gives the artifact; one that is there and whole is given as it is.

    Blocks for as long as it takes: about a second for 50 million parameters. Raises TreadleError.
    """
    report(Progress(Stage.CHECKING))
    model = open_source(source)
    check_parts(model.check())
    source_bytes = sum(path.stat().st_size for path in model.files.values())
    _check_room(store, source_bytes)
    with disk_errors("the model's files"), store.staging() as staging:
        meter = StageMeter(report, Stage.COPYING, source_bytes)
        for name, path in model.files.items():
            staging.copy(path, f"source/{name}", meter.add)
        if known := _same_source(store, staging):
            return known
        return _convert(store, staging, model, source, report)


def import_package(store: Store, name: str, report: Report = unheard) -> Published:
    """Imports the model that an installed Python package carries; see `import_source`."""
    return import_source(store, LocalSource("package", name), report)


def _convert(store: Store, staging: Staging, model: SourceModel, source: Source, report: Report) -> Published:
    # From here on only the copies are read: what was hashed is what is converted.
    parts, tensors = model.stage(staging, report)
    check_parts(parts)
    write_text_parts(staging, parts)
    report(Progress(Stage.PUBLISHING))
    return store.publish(staging, manifest_of(staging, parts, tensors, str(source)))


def _same_source(store: Store, staging: Staging) -> Published | None:
    """An artifact that this converter made from these very files; a damaged one is made anew."""
    staged = staging.listed("source")
    for digest in store.digests():
        try:
            known = store.get(digest)
        except (NotFound, DataLoss, FailedPrecondition):
            # Gone meanwhile, or another's manifest that cannot be read: neither is this import's.
            continue
        if known.manifest.source_files == staged and known.manifest.converter == CONVERTER:
            return known if store.is_whole(known) else None
    return None


def _check_room(store: Store, source_bytes: int) -> None:
    """Refuses early what cannot fit: the copy alone is as large as the source."""
    free = shutil.disk_usage(store.root).free
    if free < source_bytes:
        raise ResourceExhausted(
            f"the model has {source_bytes} bytes and the store's disk {free} free; free some space first",
            reason="DISK_FULL",
        )
