"""An import from another registry: files are brought, and the artifact must be the one that was claimed.

Nothing is converted: the canonical files are taken as they are, and the three digests over them anew. What
has arrived stays among the uploads for a day, so that an import that was killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from treadle.errors import DataLoss, FailedPrecondition, NotFound, ResourceExhausted, TreadleError
from treadle.transfer.download import Target
from treadle_registry.clients import Remote, RemoteArtifact
from treadle_registry.config import RemotesConfig
from treadle_registry.formats.canonical import (
    TextParts,
    check_parts,
    manifest_of,
    write_text_parts,
)
from treadle_registry.formats.huggingface_folder import HuggingFaceFolder
from treadle_registry.names import check_file_name
from treadle_registry.operations.progress import Progress, Report, Stage, StageMeter, unheard
from treadle_registry.sources.remote_source import RemoteSource
from treadle_registry.store.manifest import GenerationDefaults, Manifest
from treadle_registry.store.staging import Staging, disk_errors
from treadle_registry.store.store import Published, Store
from treadle_registry.store.uploads import Uploads

_TEMPLATES = "additional_chat_templates"


def check_remote(source: RemoteSource, config: RemotesConfig) -> Manifest:
    """What the import would give, by what the other registry says; nothing is fetched."""
    claimed = asyncio.run(_remote(source, config).resolve(source.model))
    _check_imported(claimed)
    return Manifest(
        digests=None,
        facts=claimed.facts,
        defaults=GenerationDefaults(),
        files=(),
        source_files=claimed.source_files,
        source=claimed.source,
        create_time=0.0,
        converter=claimed.converter,
    )


def import_remote(
    store: Store, source: RemoteSource, config: RemotesConfig, report: Report = unheard
) -> Published:
    """Brings an artifact of another registry; one that is here and whole is given as it is.

    Blocks for as long as it takes. Raises InvalidArgument for a remote that the settings do not know, what
    `Remote.resolve` and `Remote.fetch` raise, DataLoss (DIGEST_MISMATCH) where the files do not make the
    artifact that was claimed, and ResourceExhausted (DISK_FULL).
    """
    report(Progress(Stage.CHECKING))
    remote, uploads = _remote(source, config), Uploads(store)
    claimed = asyncio.run(remote.resolve(source.model))
    _check_imported(claimed)
    if known := _known(store, claimed):
        return known
    with disk_errors("the other registry's files"):
        _fetch(store, uploads, remote, claimed, report)
        with store.staging() as staging:
            made = _staged(store, uploads, staging, claimed, report)
            report(Progress(Stage.PUBLISHING))
            published = store.publish(staging, made)
    for file in claimed.different_files:
        uploads.forget(file.digest)
    return published


def _remote(source: RemoteSource, config: RemotesConfig) -> Remote:
    return Remote(source.remote, config.address(source.remote), config.credentials(source.remote))


def _check_imported(claimed: RemoteArtifact) -> None:
    if claimed.derived_from:
        raise FailedPrecondition(
            f"it was derived there from {claimed.derived_from}; import that one, and derive it here",
            reason="REMOTE_DERIVED",
            metadata={"parent_digest": claimed.derived_from},
        )


def _known(store: Store, claimed: RemoteArtifact) -> Published | None:
    """The artifact, where it is here and whole; a damaged one is made anew."""
    with contextlib.suppress(NotFound, DataLoss):
        published = store.get(claimed.digests.artifact)
        if store.is_whole(published):
            return published
    return None


def _fetch(store: Store, uploads: Uploads, remote: Remote, claimed: RemoteArtifact, report: Report) -> None:
    """Brings what neither an artifact nor an earlier try has; what an artifact has is checked here."""
    files = claimed.different_files
    missing = [file for file in files if not uploads.arrived(file.digest).complete]
    needed = sum(file.size - min(uploads.arrived(file.digest).size, file.size) for file in missing)
    if (free := shutil.disk_usage(store.root).free) < needed:
        raise ResourceExhausted(
            f"{needed} bytes are to come and the store's disk has {free} free; free some space first",
            reason="DISK_FULL",
            metadata={"needed_bytes": str(needed)},
        )
    meter = StageMeter(report, Stage.DOWNLOADING, sum(file.size for file in missing))
    uploads.prepare()
    places = [Target(file, uploads.path(file.digest), uploads.partial(file.digest)) for file in missing]
    asyncio.run(remote.fetch(places, meter.add))


def _staged(
    store: Store, uploads: Uploads, staging: Staging, claimed: RemoteArtifact, report: Report
) -> Manifest:
    """Puts the files where they belong and gives the manifest; raises DataLoss where it is another's."""
    total = sum(file.size for file in (*claimed.files, *claimed.source_files))
    meter = StageMeter(report, Stage.COPYING, total)
    for kind, files in (("canonical", claimed.files), ("source", claimed.source_files)):
        for file in files:
            name = f"{kind}/{file.path}"
            staging.link(uploads.path(file.digest), name, meter.add)
            if staging.files[name].digest != file.digest:
                uploads.forget(file.digest)
                raise DataLoss(
                    f"{name} is damaged since it arrived; import again, which fetches it anew",
                    reason="CHECKSUM_MISMATCH",
                    metadata={"file": name, "expected_digest": file.digest},
                )
    try:
        with store.staging() as scratch:
            made = _recomputed(scratch, staging, claimed, report)
    except TreadleError as error:
        raise DataLoss(
            f"what the other registry has under {claimed.digests.artifact} is no model: {error.message}",
            reason="DIGEST_MISMATCH",
        ) from error
    if made.digests != claimed.digests:
        assert made.digests is not None
        parts = {
            name: f"{getattr(claimed.digests, name)} was claimed, {found} is right"
            for name in ("compute", "tokenizer", "presentation")
            if (found := getattr(made.digests, name)) != getattr(claimed.digests, name)
        }
        raise DataLoss(
            "the files are not the artifact that was claimed: "
            + "; ".join(f"{name}: {what}" for name, what in parts.items()),
            reason="DIGEST_MISMATCH",
            metadata={"artifact": claimed.digests.artifact, "found": made.digests.artifact},
        )
    return replace(
        made,
        files=staging.listed("canonical"),
        source_files=staging.listed("source"),
        facts=replace(made.facts, license=claimed.facts.license),
        source=claimed.source,
        converter=claimed.converter,
        create_time=claimed.create_time,
    )


def _recomputed(scratch: Staging, staging: Staging, claimed: RemoteArtifact, report: Report) -> Manifest:
    """The manifest of the canonical files, as if they were imported: their canonical form is themselves."""
    names = [file.path for file in claimed.files if "/" not in file.path]
    for name in names:
        scratch.link(staging.path(f"canonical/{check_file_name(name, 'the artifact')}"), f"source/{name}")
    if lacking := {"config.json", "tokenizer.json"} - set(names):
        raise FailedPrecondition(f"{min(lacking)} is missing", reason="MISSING_FILE")
    weights = [name for name in names if name.endswith(".safetensors")]
    model = HuggingFaceFolder.of_files({name: scratch.path(f"source/{name}") for name in names}, weights)
    parts, tensors = model.stage(scratch, report)
    parts = _with_templates(parts, staging, claimed)
    check_parts(parts)
    write_text_parts(scratch, parts)
    found = {file.path for file in scratch.listed("canonical")}
    if strangers := {file.path for file in claimed.files} ^ found:
        raise FailedPrecondition(f"of {min(strangers)[:100]!r} nothing was known", reason="STRANGE_FILE")
    return manifest_of(scratch, parts, tensors, claimed.source)


def _with_templates(parts: TextParts, staging: Staging, claimed: RemoteArtifact) -> TextParts:
    """With the chat templates that have files of their own."""
    templates = dict(parts.chat_templates)
    for file in claimed.files:
        if file.path.startswith(f"{_TEMPLATES}/"):
            name = Path(file.path).name
            try:
                text = staging.path(f"canonical/{file.path}").read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise FailedPrecondition(f"{name[:100]!r} is not UTF-8", reason="CORRUPT_CONFIG") from error
            templates[name.removesuffix(".jinja")] = text
    return replace(parts, chat_templates=templates)
