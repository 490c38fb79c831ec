"""`treadle keys`: the file of hashed keys that services check callers against."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from treadle.cli.console import message_console, result_console
from treadle.cli.help import add_command
from treadle.errors import invalid_field
from treadle.security import Role, TransportConfig
from treadle.security.key_file import KeyFile, add_key, revoke_key
from treadle.security.keys import KEY_ID, KeyRecord, new_key

File = Annotated[
    Path | None,
    typer.Option("--file", help="The file of hashed keys.", show_default="TREADLE_KEYS_FILE"),
]
Id = Annotated[str, typer.Argument(help="The key's name: 1 to 32 of a-z, 0-9 and -.", show_default=False)]
_LIFE = re.compile(r"([1-9][0-9]{0,4})([hd])")
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def build_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Make, list and revoke the keys that callers show.", no_args_is_help=True)
    add_command(app, create)
    add_command(app, list_, "list")
    add_command(app, revoke)
    return app


def create(
    key_id: Id,
    role: Annotated[list[Role], typer.Option(help="What the key may do; may be given several times.")],
    tenant: Annotated[
        list[str] | None,
        typer.Option(help="A tenant that it may act for; may be given several times.", show_default="all"),
    ] = None,
    expires_in: Annotated[
        str, typer.Option(metavar="30d", help="Its life, in days (d) or hours (h).", show_default="for ever")
    ] = "",
    file: File = None,
) -> None:
    """Make a key, print it once, and keep its hash.

    The key stands alone on standard output. Running services take it up within seconds. infer generates,
    tokenises and looks models up; train is for jobs, serve for workers; monitor reads metrics; admin may do
    everything.

    Examples:

      treadle keys create web --role infer --tenant shop --expires-in 90d --file keys.json

      treadle keys create suite --role admin --file keys.json > suite.key
    """
    if not KEY_ID.fullmatch(key_id):
        raise invalid_field("key_id", f"must be 1 to 32 of a-z, 0-9 and -; got {key_id!r}")
    for name in tenant or ():
        if not _TENANT.fullmatch(name):
            raise invalid_field("tenant", f"must be 1 to 64 of [A-Za-z0-9._-]; got {name!r}")
    text, record = new_key(key_id, role, tenants=tenant or None, expires_at=_end_of(expires_in))
    path = _path(file)
    add_key(path, record)
    typer.echo(text)
    message_console().print(f"{path} has its hash; the key itself is shown this once", style="dim")


def list_(
    file: File = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List the keys: names, roles, tenants and ends, never the keys themselves."""
    records = list(KeyFile.read(_path(file)).records.values())
    if as_json:
        typer.echo(json.dumps([_facts(record) for record in records], indent=2))
        return
    table = Table("KEY", "ROLES", "TENANTS", "EXPIRES", box=None, pad_edge=False)
    for record in records:
        facts = _facts(record)
        tenants = "all" if record.tenants is None else ", ".join(sorted(record.tenants))
        table.add_row(
            record.key_id, ", ".join(sorted(record.roles)), tenants, str(facts["expires_at"] or "never")
        )
    result_console().print(table)


def revoke(key_id: Id, file: File = None) -> None:
    """Take a key away; running services refuse it within seconds, calls that run go on."""
    path = _path(file)
    revoke_key(path, key_id)
    message_console().print(f"{path} no longer has {key_id}")


def _path(given: Path | None) -> Path:
    path = given or TransportConfig().keys_file
    if path is None:
        raise invalid_field("file", "say which file: --file keys.json, or TREADLE_KEYS_FILE")
    return path


def _end_of(life: str) -> datetime | None:
    if not life:
        return None
    match = _LIFE.fullmatch(life)
    if match is None:
        raise invalid_field("expires_in", f"must be days or hours, as 30d or 12h; got {life!r}")
    count = int(match[1])
    return datetime.now(UTC) + (timedelta(days=count) if match[2] == "d" else timedelta(hours=count))


def _facts(record: KeyRecord) -> dict[str, object]:
    expires = record.expires_at
    return {
        "id": record.key_id,
        "roles": sorted(record.roles),
        "tenants": None if record.tenants is None else sorted(record.tenants),
        "expires_at": None if expires is None else expires.isoformat(timespec="seconds"),
    }
