"""`treadle models download` and `treadle models upload`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import message_console, result_console
from treadle.cli.help import add_command
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials, registry_address
from treadle.cli.names import full_name
from treadle.cli.options import Registry
from treadle.cli.report import Report
from treadle.client import Downloaded, ImportProgress, RegistryClient


def add_transfer_commands(app: typer.Typer) -> None:
    """Adds both."""
    add_command(app, download)
    add_command(app, upload)


def download(
    name: Annotated[str, typer.Argument(help="An alias, a digest, or the start of one.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Where the files go.", show_default=False)],
    tokenizer_only: Annotated[
        bool, typer.Option("--tokenizer-only", help="The tokenizer and the chat templates, no weights.")
    ] = False,
    registry: Registry = "",
) -> None:
    """Fetch a model's files from the registry to this machine.

    Every file is checked by its hash. A download that was cut off goes on where it was.

    Examples:

      treadle models download smollm2 ./smollm2

      treadle models download smollm2 ./tokenizer --tokenizer-only
    """
    done = run_until_interrupted(_download(registry_address(registry), name, folder, tokenizer_only))
    fetched = f"{done.received_bytes / 1e6:.1f} of {done.total_bytes / 1e6:.1f} MB were fetched"
    result_console().print(f"{done.artifact_digest}  {done.folder}  ({fetched})")


async def _download(address: str, name: str, folder: Path, tokenizer_only: bool) -> Downloaded:
    report, what = Report(message_console()), f"download {name}"
    async with RegistryClient(address, credentials=credentials()) as client:
        fetch = client.download_tokenizer if tokenizer_only else client.download_model
        with report.live():
            done = await fetch(
                await full_name(client, name),
                folder,
                progress=lambda here, total: report.working(what, "downloading", here, total),
            )
            report.working(what, "done", done.total_bytes, done.total_bytes)
    return done


def upload(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A Hugging Face folder or a .gguf file here.",
            show_default=False,
        ),
    ],
    alias: Annotated[str, typer.Option(help="The name to give it.", show_default=False)] = "",
    registry: Registry = "",
) -> None:
    """Send a model of this machine to the registry, which imports it.

    For a registry on another machine; where the registry can read the folder itself, `import` copies less. An
    upload that was cut off goes on where it was, for a day.
    """
    last = run_until_interrupted(_upload(registry_address(registry), path, alias))
    assert last.artifact is not None
    known = " (the store had it before)" if last.already_present else ""
    named = f"  {alias}" if alias else ""
    result_console().print(f"{last.artifact.digest}{named}{known}")


async def _upload(address: str, path: Path, alias: str) -> ImportProgress:
    report, last = Report(message_console()), None
    async with RegistryClient(address, credentials=credentials()) as client:
        with report.live():
            async for last in client.upload_model(path, alias=alias):
                report.working(f"upload {alias or path.name}", last.stage, last.done_bytes, last.total_bytes)
    assert last is not None
    return last
