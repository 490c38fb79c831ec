"""An import from end to end, in this process: find, check, copy, convert, publish."""

from __future__ import annotations

import contextlib

from treadle.errors import DataLoss
from treadle.models.stored_folder import StoredFile
from treadle_registry.config import HubConfig
from treadle_registry.formats.canonical import (
    check_parts,
    facts_of,
    generation_defaults,
    manifest_of,
    task_facts_of,
    write_text_parts,
)
from treadle_registry.operations.progress import Progress, Report, Stage, StageMeter, unheard
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.local import open_source
from treadle_registry.sources.opened import OpenedSource
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.manifest import CONVERTER, Manifest
from treadle_registry.store.staging import Staging, check_room, disk_errors
from treadle_registry.store.store import Published, Store


def open_any(
    source: LocalSource | HubSource, hub: HubConfig | None = None, report: Report = unheard
) -> OpenedSource:
    """The source's files on this machine, brought here where they are elsewhere; raises TreadleError."""
    if isinstance(source, LocalSource):
        return OpenedSource(open_source(source), str(source))
    # A quarter of a second, which the others need not spend.
    from treadle_registry.sources.hub import open_hub
    from treadle_registry.sources.hub_client import HubClient

    return open_hub(source, HubClient.of(hub or HubConfig()), report)


def check_source(source: LocalSource | HubSource, hub: HubConfig | None = None) -> Manifest:
    """What importing `source` would give, as far as can be said without converting; writes nothing.

    Of a hub's weights only the headers are read.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, LocalSource):
            opened = open_any(source)
        else:
            from treadle_registry.sources.hub_client import HubClient
            from treadle_registry.sources.hub_files import check_required
            from treadle_registry.sources.hub_headers import hub_headers

            headers = stack.enter_context(hub_headers(source, HubClient.of(hub or HubConfig())))
            if not headers.is_gguf:
                check_required(headers.files)
            opened = headers.opened(linked=False)
        return check_opened(opened)


def check_opened(opened: OpenedSource) -> Manifest:
    """See `check_source`."""
    model = opened.model
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
        source=opened.origin,
        create_time=0.0,
        task_facts=task_facts_of(parts),
    )


def import_source(
    store: Store, source: LocalSource | HubSource, report: Report = unheard, hub: HubConfig | None = None
) -> Published:
    """Imports `source` into `store` and gives the artifact; one that is there and whole is given as it is.

    Blocks for as long as it takes: about a second for 50 million parameters, and the download before.
    Raises TreadleError.
    """
    report(Progress(Stage.CHECKING))
    return import_opened(store, open_any(source, hub, report), report)


def import_opened(store: Store, opened: OpenedSource, report: Report = unheard) -> Published:
    """Imports a model whose files were found; see `import_source`."""
    model = opened.model
    check_parts(model.check())
    source_bytes = sum(path.stat().st_size for path in model.files.values())
    if not opened.linked:
        # The copy alone is as large as the source.
        check_room(store.root, source_bytes, "the model has")
    with disk_errors("the model's files"), store.staging() as staging:
        meter = StageMeter(report, Stage.COPYING, source_bytes)
        for name, path in model.files.items():
            take = staging.link if opened.linked else staging.copy
            take(path, f"source/{name}", meter.add)
            _check_hash(opened, name, staging)
        if known := _same_source(store, staging):
            return known
        return _convert(store, staging, opened, report)


def _check_hash(opened: OpenedSource, name: str, staging: Staging) -> None:
    """What the source says of a file holds for what was staged, also where it had lain in a cache."""
    expected, found = opened.sha256.get(name), staging.files[f"source/{name}"].digest
    if expected and found != f"sha256:{expected}":
        path = opened.model.files[name].resolve()
        raise DataLoss(
            f"{name} is damaged: {path} has the hash {found.removeprefix('sha256:')} and not {expected}; "
            "remove that file and import again",
            reason="CHECKSUM_MISMATCH",
            metadata={"file": name, "expected_hash": expected},
        )


def import_package(store: Store, name: str, report: Report = unheard) -> Published:
    """Imports the model that an installed Python package carries; see `import_source`."""
    return import_source(store, LocalSource("package", name), report)


def _convert(store: Store, staging: Staging, opened: OpenedSource, report: Report) -> Published:
    # From here on only what was staged is read: what was hashed is what is converted.
    parts, tensors = opened.model.stage(staging, report)
    check_parts(parts)
    write_text_parts(staging, parts)
    report(Progress(Stage.PUBLISHING))
    return store.publish(staging, manifest_of(staging, parts, tensors, opened.origin))


def _same_source(store: Store, staging: Staging) -> Published | None:
    """An artifact that this converter made from these very files; a damaged one is made anew."""
    staged = staging.listed("source")
    for known in store.readable():
        manifest = known.manifest
        made_here = manifest.converter == CONVERTER and not manifest.fetched_from
        if made_here and manifest.source_files == staged:
            return known if store.is_whole(known) else None
    return None
