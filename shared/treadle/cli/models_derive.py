"""`treadle models quantize`, `convert` and `merge`: other forms of a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
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
from treadle.client import DerivationProgress, RegistryClient

Name = Annotated[str, typer.Argument(help="An alias, a digest, or the start of one.", show_default=False)]
Alias = Annotated[str, typer.Option(help="The name to give the result.", show_default=False)]
Start = Callable[[RegistryClient, str], AsyncIterator[DerivationProgress]]


def add_derive_commands(app: typer.Typer) -> None:
    """Adds the three commands to the group."""
    add_command(app, quantize)
    add_command(app, convert)
    add_command(app, merge)


def quantize(
    name: Name,
    to: Annotated[str, typer.Option(help="int8, int4 or mxfp4.", show_default=False)],
    alias: Alias = "",
    registry: Registry = "",
) -> None:
    """Make a model whose weights are stored in few bits.

    It loads quicker and takes less room than the model that it is made of. int8 and int4 are what an engine
    makes of that one when it is told to quantise. Made once: asking again gives what is there.

    Examples:

      treadle models quantize smollm2 --to int8 --alias smollm2-int8
    """
    _run(
        f"quantize {name}",
        name,
        alias,
        registry,
        lambda client, model: client.quantize(model, to, alias=alias),
    )


def convert(
    name: Name,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.", show_default=False)],
    alias: Alias = "",
    registry: Registry = "",
) -> None:
    """Make a model whose weights are stored in another type.

    The values are those of the files as they were imported, which may be finer than the store's bfloat16.

    Examples:

      treadle models convert smollm2 --dtype float32 --alias smollm2-float32
    """
    _run(
        f"convert {name}",
        name,
        alias,
        registry,
        lambda client, model: client.convert(model, dtype, alias=alias),
    )


def merge(
    name: Name,
    adapter: Annotated[
        Path, typer.Option(help="Folder of a LoRA adapter, as PEFT saves it.", show_default=False)
    ],
    alias: Alias = "",
    registry: Registry = "",
) -> None:
    """Make a model with a LoRA adapter added to its weights.

    Examples:

      treadle models merge smollm2 --adapter ./my-adapter --alias smollm2-mine
    """
    folder = str(adapter.expanduser().resolve())
    _run(
        f"merge {name}", name, alias, registry, lambda client, model: client.merge(model, folder, alias=alias)
    )


def _run(what: str, name: str, alias: str, registry: str, start: Start) -> None:
    last = run_until_interrupted(_follow(registry_address(registry), what, name, start))
    assert last.artifact is not None
    known = " (the store had it before)" if last.already_present else ""
    named = f"  {alias}" if alias else ""
    result_console().print(f"{last.artifact.digest}{named}{known}")


async def _follow(address: str, what: str, name: str, start: Start) -> DerivationProgress:
    report = Report(message_console())
    last = None
    async with RegistryClient(address, credentials=credentials()) as client:
        model = await full_name(client, name)
        with report.live():
            async for last in start(client, model):
                report.working(
                    what, "done" if last.artifact else "converting", last.done_bytes, last.total_bytes
                )
    assert last is not None
    return last
