"""`treadle models leases` and `evict`."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from treadle.cli.console import message_console, result_console
from treadle.cli.help import add_command
from treadle.cli.locate import credentials, registry_address
from treadle.cli.names import full_name
from treadle.cli.options import AsJson, Registry
from treadle.client import Evictions, Lease, RegistryClient
from treadle.errors import invalid_field

_SHORT = len("sha256:") + 12
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(|kB|MB|GB|TB)", re.IGNORECASE)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def add_lease_commands(app: typer.Typer) -> None:
    """Adds them to the group."""
    add_command(app, leases, "leases")
    add_command(app, evict, "evict")


def leases(
    model: Annotated[
        str,
        typer.Argument(help="An alias, a digest, or the start of one; nothing: all.", show_default=False),
    ] = "",
    as_json: AsJson = False,
    registry: Registry = "",
) -> None:
    """List who holds models: workers, jobs, clients."""

    async def look() -> list[Lease]:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            digest = (await client.resolve(await full_name(client, model))).digest if model else ""
            return await client.leases(digest)

    found = asyncio.run(look())
    if as_json:
        typer.echo(json.dumps([asdict(lease) for lease in found], indent=2, default=_plain))
        return
    if not found:
        message_console().print("nobody holds a lease")
        return
    table = Table("MODEL", "HOLDER", "DOES", "ALIAS", "ENDS", box=None, pad_edge=False)
    now = datetime.now(UTC)
    for lease in found:
        left_s = (lease.expire_time - now).total_seconds()
        table.add_row(
            lease.artifact_digest[:_SHORT],
            lease.holder,
            lease.state or "-",
            lease.alias or "-",
            f"in {left_s:.0f} s",
        )
    result_console().print(table)


def evict(
    to: Annotated[
        str,
        typer.Option(metavar="SIZE", help="What the store may have then, as 20GB.", show_default="its quota"),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and why.")] = False,
    as_json: AsJson = False,
    registry: Registry = "",
) -> None:
    """Delete the models that were used least recently until the store is small enough.

    What is leased, aliased or deployed stays.
    """

    async def ask() -> Evictions:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            return await client.evict(_bytes(to) if to else None, dry_run=dry_run)

    result = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2, default=_plain))
        return
    table = Table("MODEL", "USED", "FREES", "IS", "WHY", box=None, pad_edge=False)
    for entry in result.evictions:
        table.add_row(
            entry.artifact_digest[:_SHORT],
            f"{entry.last_use_time:%Y-%m-%d %H:%M}",
            f"{entry.size / 1e6:.0f} MB",
            "kept" if entry.kept else ("would go" if dry_run else "deleted"),
            entry.reason,
        )
    if result.evictions:
        result_console().print(table)
    before, after = result.store_bytes_before / 1e6, result.store_bytes_after / 1e6
    message_console().print(
        f"the store has {before:.0f} MB, and {'would have' if dry_run else 'now'} {after:.0f} MB"
    )


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise invalid_field("to", f"must be a size, as 20GB or 500MB; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _plain(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
