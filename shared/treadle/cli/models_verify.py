"""`treadle models verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from treadle.cli.console import message_console, result_console
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials, registry_address
from treadle.cli.names import full_name
from treadle.cli.options import AsJson, Registry
from treadle.cli.report import Report
from treadle.client import RegistryClient, Verification
from treadle.errors import DataLoss


def verify(
    name: Annotated[
        str,
        typer.Argument(
            help="An alias, a digest, or the start of one; nothing: every model.", show_default=False
        ),
    ] = "",
    as_json: AsJson = False,
    registry: Registry = "",
) -> None:
    """Hash a model's files again, and say which are damaged.

    Exits with 1 when one is. Importing the model again, from wherever, puts its files right.
    """
    last = run_until_interrupted(_verify(registry_address(registry), name))
    if as_json:
        rows = [asdict(file) for file in last.damaged_files]
        said = {"artifacts": last.artifacts, "total_bytes": last.total_bytes, "damaged_files": rows}
        typer.echo(json.dumps(said, indent=2))
    elif not last.damaged_files:
        models = "1 model" if last.artifacts == 1 else f"{last.artifacts} models"
        result_console().print(f"{models}, {last.total_bytes / 1e6:.0f} MB: every file is whole")
    else:
        _print_damaged(last)
    if last.damaged_files:
        raise DataLoss(
            f"{len(last.damaged_files)} files are damaged; import their models again, which replaces them",
            reason="DAMAGED_FILE",
        )


def _print_damaged(last: Verification) -> None:
    table = Table("MODEL", "FILE", "EXPECTED", "FOUND", box=None, pad_edge=False)
    for file in last.damaged_files:
        table.add_row(file.artifact_digest, file.path, file.expected_digest or "-", file.found_digest or "-")
    result_console().print(table)


async def _verify(address: str, name: str) -> Verification:
    report = Report(message_console())
    last = None
    async with RegistryClient(address, credentials=credentials()) as client:
        digest = (await client.resolve(await full_name(client, name))).digest if name else ""
        with report.live():
            async for last in client.verify(digest):
                stage = "done" if last.done else "hashing"
                report.working(f"verify {name or 'all'}", stage, last.done_bytes, last.total_bytes)
    assert last is not None
    return last
