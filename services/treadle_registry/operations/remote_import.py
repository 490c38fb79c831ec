"""An import from another registry: files are brought, and the artifact must be the one that was claimed.

Nothing is converted: the canonical files are taken as they are, and the three digests over them anew. What
has arrived stays among the uploads for a day, so that an import that was killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from treadle.errors import Aborted, DataLoss, FailedPrecondition, NotFound, TreadleError
from treadle.models.stored_folder import StoredFile
from treadle.transfer.download import Target
from treadle.transfer.file_names import is_model_file
from treadle_registry.clients import Remote, RemoteArtifact
from treadle_registry.config import RemotesConfig
from treadle_registry.formats.canonical import (
    TextParts,
    check_parts,
    manifest_of,
    write_text_parts,
)
from treadle_registry.formats.float_tensors import FLOAT_TYPES
from treadle_registry.formats.huggingface_folder import HuggingFaceFolder
from treadle_registry.names import check_file_name
from treadle_registry.operations.deriving import adapter_digest
from treadle_registry.operations.progress import Progress, Report, Stage, StageMeter, unheard
from treadle_registry.sources.remote_source import RemoteSource
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.manifest import GenerationDefaults, Manifest
from treadle_registry.store.staging import Staging, check_room, disk_errors
from treadle_registry.store.store import Published, Store
from treadle_registry.store.uploads import Uploads

_TEMPLATES, _TEMPLATE = "additional_chat_templates", "chat_template.jinja"
_MISMATCH = "DIGEST_MISMATCH"


def check_remote(source: RemoteSource, config: RemotesConfig) -> Manifest:
    """What the import would give, by what the other registry says; nothing is fetched."""
    claimed = asyncio.run(_remote(source, config).resolve(source.model))
    return Manifest(
        digests=None,
        facts=claimed.facts,
        defaults=GenerationDefaults(),
        files=(),
        source_files=claimed.source_files,
        source=claimed.source,
        create_time=0.0,
        converter=claimed.converter,
        parent_digest=claimed.parent_digest,
        derivation=claimed.derivation,
        task_facts=claimed.task_facts,
        fetched_from=source.remote,
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
    if known := _known(store, claimed):
        return known
    with disk_errors("the other registry's files"):
        _fetch(store, uploads, remote, claimed, report)
        with store.staging() as staging:
            made = _staged(store, staging, claimed, report)
            report(Progress(Stage.PUBLISHING))
            published = store.publish(staging, replace(made, fetched_from=source.remote))
    for file in claimed.different_files:
        uploads.forget(file.digest)
    return published


def _remote(source: RemoteSource, config: RemotesConfig) -> Remote:
    return Remote(source.remote, config.address(source.remote), config.credentials(source.remote))


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
    check_room(store.root, needed, "what is to come has")
    meter = StageMeter(report, Stage.DOWNLOADING, sum(file.size for file in missing))
    uploads.prepare()
    places = [Target(file, uploads.path(file.digest), uploads.partial(file.digest)) for file in missing]
    asyncio.run(remote.fetch(places, meter.add))


def _staged(store: Store, staging: Staging, claimed: RemoteArtifact, report: Report) -> Manifest:
    """Puts the files where they belong and gives the manifest; raises DataLoss where it is another's."""
    total = sum(file.size for file in (*claimed.files, *claimed.source_files))
    meter = StageMeter(report, Stage.COPYING, total)
    with store.staging() as scratch:
        for file in claimed.files:
            _link(store, scratch, file, f"source/{file.path}", meter)
        try:
            made = _recomputed(scratch, claimed, report)
        except TreadleError as error:
            raise DataLoss(
                f"what the other registry has under {claimed.digests.artifact} is no model: {error.message}",
                reason=_MISMATCH,
            ) from error
        _check_digests(made, claimed)
        _check_derivation(made, claimed)
        # As this registry writes them: beside what the digests are over, texts may say what changes a model.
        for file in made.files:
            staging.link(scratch.path(f"canonical/{file.path}"), f"canonical/{file.path}")
    for file in claimed.source_files:
        _link(store, staging, file, f"source/{file.path}", meter)
    derived = claimed.derivation is not None
    return replace(
        made,
        source_files=staging.listed("source"),
        facts=replace(
            made.facts,
            license=claimed.facts.license,
            # Of the files as they came, which for one that was derived are these.
            dtypes=made.facts.dtypes if derived else claimed.facts.dtypes,
        ),
        source=claimed.source,
        converter=claimed.converter,
        create_time=claimed.create_time,
        parent_digest=claimed.parent_digest,
        derivation=claimed.derivation,
    )


def _link(store: Store, staging: Staging, file: StoredFile, name: str, meter: StageMeter) -> None:
    """Gives what has arrived its name; raises DataLoss (CHECKSUM_MISMATCH) where it is damaged since, and
    Aborted where it is gone."""
    uploads = Uploads(store)
    # Another import may have taken the same file up meanwhile: then it is an artifact's.
    for place in (uploads.path(file.digest), store.blob_path(file.digest)):
        with contextlib.suppress(FileNotFoundError):
            staging.link(place, name, meter.add)
            break
    else:
        raise Aborted(
            f"{file.path} was deleted meanwhile, with another model that has it; import again",
            reason="DELETED",
        )
    if staging.files[name].digest != file.digest:
        uploads.forget(file.digest)
        raise DataLoss(
            f"{file.path} is damaged since it arrived; import again, which fetches it anew",
            reason="CHECKSUM_MISMATCH",
            metadata={"file": file.path, "expected_digest": file.digest},
        )


def _check_digests(made: Manifest, claimed: RemoteArtifact) -> None:
    assert made.digests is not None
    if made.digests == claimed.digests:
        return
    parts = {
        name: f"{getattr(claimed.digests, name)} was claimed, {found} is right"
        for name in ("compute", "tokenizer", "presentation")
        if (found := getattr(made.digests, name)) != getattr(claimed.digests, name)
    }
    raise DataLoss(
        "the files are not the artifact that was claimed: "
        + "; ".join(f"{name}: {what}" for name, what in parts.items()),
        reason=_MISMATCH,
        metadata={"artifact": claimed.digests.artifact, "found": made.digests.artifact},
    )


def _check_derivation(made: Manifest, claimed: RemoteArtifact) -> None:
    """Raises DataLoss (DERIVATION_MISMATCH) for a derivation that these files cannot be of.

    Whether they are made of that parent only making them again tells.
    """
    derivation, found, possible = claimed.derivation, made.facts.quantization, False
    types = {share.dtype for share in made.facts.dtypes}
    match derivation:
        case None:
            possible = True
        case Derivation(kind="dtype"):
            possible = types == {FLOAT_TYPES[derivation.value]} and not (found or claimed.source_files)
        case Derivation(kind="quantization"):
            possible = found == derivation.value and not claimed.source_files
        case _:
            with contextlib.suppress(KeyError):
                possible = derivation.value == adapter_digest(claimed.source_files) and not found
    if not possible:
        raise DataLoss(
            f"the files are not the model that was claimed, {derivation}: they are "
            f"{found or ', '.join(sorted(types))}",
            reason="DERIVATION_MISMATCH",
            metadata={"artifact": claimed.digests.artifact},
        )


def _recomputed(scratch: Staging, claimed: RemoteArtifact, report: Report) -> Manifest:
    """The manifest of the canonical files, as if they were imported: their canonical form is themselves."""
    names = [file.path for file in claimed.files if not file.path.startswith(f"{_TEMPLATES}/")]
    for name in names:
        if not is_model_file(name):
            check_file_name(name, "the artifact")
    if lacking := {"config.json", "tokenizer.json"} - set(names):
        raise FailedPrecondition(f"{min(lacking)} is missing", reason="MISSING_FILE")
    weights = [name for name in names if name.endswith(".safetensors")]
    model = HuggingFaceFolder.of_files({name: scratch.path(f"source/{name}") for name in names}, weights)
    parts, tensors = model.stage(scratch, report, as_stored=claimed.derivation is not None)
    parts = _with_templates(parts, scratch, claimed)
    check_parts(parts)
    write_text_parts(scratch, parts)
    found = {file.path for file in scratch.listed("canonical")}
    if strangers := {file.path for file in claimed.files} ^ found:
        raise FailedPrecondition(f"of {min(strangers)[:100]!r} nothing was known", reason="STRANGE_FILE")
    return manifest_of(scratch, parts, tensors, claimed.source)


def _with_templates(parts: TextParts, scratch: Staging, claimed: RemoteArtifact) -> TextParts:
    """With the chat templates that have files, whose ends of line are as they were written."""
    templates = dict(parts.chat_templates)
    for file in claimed.files:
        folder, _, name = file.path.rpartition("/")
        if folder == _TEMPLATES or file.path == _TEMPLATE:
            try:
                text = scratch.path(f"source/{file.path}").read_bytes().decode()
            except UnicodeDecodeError as error:
                raise FailedPrecondition(f"{name[:100]!r} is not UTF-8", reason="CORRUPT_CONFIG") from error
            templates[name.removesuffix(".jinja") if folder else "default"] = text
    return replace(parts, chat_templates=templates)
