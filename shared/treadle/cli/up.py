"""`treadle up`: the whole suite on this machine, left running."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.console import message_console, result_console
from treadle.cli.first_steps import first_steps
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials
from treadle.cli.report import Report
from treadle.client import AsyncClient, ServedModel
from treadle.errors import TreadleError
from treadle.local import Home, LocalConfig, LocalStack, ModelToServe, StackOptions
from treadle.local.config import inherited_environment

GatewayPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="The gateway's port; 0: any.",
        show_default="50051, or any when it is taken",
    ),
]
"""The option of every command that starts a suite."""


def local_options(
    models: list[str], *, workers: int = 1, port: int | None = None, redis_url: str = ""
) -> tuple[Home, StackOptions]:
    """The home and the options of a local suite, from the command line and the environment."""
    config = LocalConfig()
    options = StackOptions(
        models=[ModelToServe.parse(model) for model in models],
        workers=workers,
        port=port,
        redis_url=redis_url,
        fallback_redis_url=config.redis_url,
        inherited=inherited_environment(),
        credentials=credentials(),
    )
    return Home(config.home), options


def up(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="What to serve: an alias of the store, or ALIAS=SOURCE to import it first where the store "
            "does not have it. May be given several times.",
            show_default="smollm2",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Worker processes; each serves every model.")
    ] = 1,
    port: GatewayPort = None,
    redis_url: Annotated[
        str, typer.Option(help="Use this Redis or Valkey instead of starting one.", metavar="URL")
    ] = "",
) -> None:
    """Start every service on this machine and leave it running until Ctrl-C.

    Each service is a process of its own; one that dies is started again. The first start imports the
    packaged SmolLM2. The store, the logs and the state lie in TREADLE_HOME (~/.cache/treadle).

    Examples:

      treadle up

      treadle up --workers 2 --port 50060

      treadle up --model smollm2 --model minilm

      treadle up --model smollm2 --model tiny=./my-llama-folder

      treadle up --model qwen=~/models/qwen2.5-0.5b-q8_0.gguf
    """
    home, options = local_options(model or ["smollm2"], workers=workers, port=port, redis_url=redis_url)
    run_until_interrupted(_serve(home, options))


async def _serve(home: Home, options: StackOptions) -> None:
    report = Report(message_console())
    stack = LocalStack(home, options, report)
    with report.live():
        await stack.__aenter__()
    try:
        await _welcome(stack, options)
        await stack.wait()
    finally:
        message_console().print("stopping")
        await stack.__aexit__()


async def _welcome(stack: LocalStack, options: StackOptions) -> None:
    console = result_console()
    address = stack.addresses["gateway"]
    served = ", ".join(entry.alias for entry in options.models)
    console.print(f"\n[bold]Treadle is up at {address}[/] and serves {served}. Ctrl-C stops it.\n")
    for line in first_steps(await _served(address, options), address):
        console.print(f"  {line}", markup=False)
    console.print(f"\nlogs: {stack.home.logs}", style="dim")


async def _served(address: str, options: StackOptions) -> list[ServedModel]:
    """What the gateway can be asked for, in the order in which it was given."""
    async with AsyncClient(address, credentials=options.credentials) as client:
        try:
            models = await client.models()
        except TreadleError as error:
            message_console().print(f"the gateway does not list models: {error.message}", markup=False)
            return []
    places = {entry.alias: place for place, entry in enumerate(options.models)}
    return sorted(models, key=lambda model: places.get(model.name, len(places)))
