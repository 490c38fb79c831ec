"""`treadle models deploy`, `promote`, `rollback` and what shows deployments."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from treadle.cli.console import message_console, result_console
from treadle.cli.help import add_command
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials, registry_address
from treadle.cli.names import full_name
from treadle.cli.options import AsJson, Registry
from treadle.cli.rollout import wait_until_settled
from treadle.client import (
    Alias,
    Deployment,
    DeploymentTarget,
    Promotion,
    RegistryClient,
    ServingConfiguration,
)
from treadle.errors import invalid_field

_SHORT = len("sha256:") + 12

Name = Annotated[str, typer.Argument(help="The alias.", show_default=False)]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="An alias, a digest, or the start of one.", show_default=False),
]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until workers serve it, or leave at once.")
]
Timeout = Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="How long to wait.")]


def add_deployment_commands(app: typer.Typer) -> None:
    """Adds them to the group."""
    for command, name in (
        (deploy, "deploy"),
        (deployments, "deployments"),
        (undeploy, "undeploy"),
        (promote, "promote"),
        (rollback, "rollback"),
        (history, "history"),
    ):
        add_command(app, command, name)


def deploy(
    name: Name,
    model: Model,
    replicas: Annotated[int, typer.Option(min=1, help="Workers wanted for each model.")] = 1,
    canary: Annotated[
        str, typer.Option(metavar="MODEL", help="A second model, which gets --share.", show_default=False)
    ] = "",
    share: Annotated[int, typer.Option(min=1, max=99, help="The canary's percent of the requests.")] = 10,
    warm_up: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT", help="Answered before a worker is ready; may be given several times."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What to compute in.", show_default="the worker's")] = "",
    quantization: Annotated[str, typer.Option(help="int8 or int4.", show_default="the worker's")] = "",
    cache_dtype: Annotated[str, typer.Option(help="Of keys and values.", show_default="the worker's")] = "",
    wait: Wait = True,
    timeout: Timeout = 600.0,
    registry: Registry = "",
) -> None:
    """Say what is served under an alias.

    Workers that follow the registry take it up; what was served before goes on until one of them is ready,
    and then the alias moves. Requests that run end on the model that they began with.

    Examples:

      treadle models deploy chat qwen2 --replicas 2

      treadle models deploy chat qwen2 --canary qwen2-tuned --share 5
    """

    async def say() -> Deployment:
        configuration = ServingConfiguration(dtype, quantization, cache_dtype)
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            models = [model, *([canary] if canary else [])]
            digests = [(await client.resolve(await full_name(client, name))).digest for name in models]
            weights = [100 - share, share] if canary else [1]
            targets = tuple(
                DeploymentTarget(digest, configuration, weight)
                for digest, weight in zip(digests, weights, strict=True)
            )
            wanted = await client.set_deployment(
                Deployment(name, targets, replicas, warm_up_prompts=tuple(warm_up or ()))
            )
            if wait:
                await wait_until_settled(client, wanted, timeout)
            return await client.deployment(name)

    _print_deployed(run_until_interrupted(say()))


def _print_deployed(now: Deployment) -> None:
    state = "served" if now.settled else "wanted; `treadle models deployments` shows how far it is"
    for target in now.targets:
        result_console().print(f"{now.alias} -> {target.artifact_digest}  {state}")


def deployments(as_json: AsJson = False, registry: Registry = "") -> None:
    """List the deployments: what is wanted, what is served, and how far the workers are."""

    async def look() -> list[Deployment]:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            return await client.deployments()

    found = asyncio.run(look())
    if as_json:
        typer.echo(json.dumps([asdict(deployment) for deployment in found], indent=2, default=_plain))
        return
    if not found:
        message_console().print("nothing is deployed; `treadle models deploy NAME MODEL` does")
        return
    table = Table("ALIAS", "MODEL", "IS", "SHARE", "WORKERS", box=None, pad_edge=False)
    for deployment in found:
        for row in _rows(deployment):
            table.add_row(*row)
    result_console().print(table)


def _rows(deployment: Deployment) -> list[tuple[str, str, str, str, str]]:
    wanted = {target.artifact_digest: target for target in deployment.targets}
    served = {target.artifact_digest: target for target in deployment.serving}
    others = {status.artifact_digest for status in deployment.status} - wanted.keys() - served.keys()
    rows = []
    for digest in [*wanted, *(other for other in served if other not in wanted), *sorted(others)]:
        words = [word for word, group in (("wanted", wanted), ("served", served)) if digest in group]
        share = str(served[digest].weight) if digest in served else "-"
        rows.append(
            (
                deployment.alias,
                digest[:_SHORT],
                ", ".join(words) or "let go",
                share,
                _workers(deployment, digest),
            )
        )
    return rows


def _workers(deployment: Deployment, digest: str) -> str:
    own = [status for status in deployment.status if status.artifact_digest == digest]
    counts = [
        (sum(getattr(status, f"{state}_workers") for status in own), state)
        for state in ("ready", "loading", "draining", "failed")
    ]
    shown = ", ".join(f"{count} {state}" for count, state in counts if count) or "none"
    wanted = any(target.artifact_digest == digest for target in deployment.targets)
    return f"{shown} of {deployment.replicas}" if wanted else shown


def undeploy(name: Name, registry: Registry = "") -> None:
    """Have workers let go of what is deployed under an alias; the alias stays."""

    async def delete() -> None:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            await client.delete_deployment(name)

    asyncio.run(delete())
    result_console().print(f"nothing is deployed under {name} any more")


def promote(
    name: Name, model: Model, wait: Wait = True, timeout: Timeout = 600.0, registry: Registry = ""
) -> None:
    """Make a model what an alias means.

    Where workers serve the alias, one of them takes the model up first, and the alias moves when it is
    ready; else it moves at once.
    """

    async def say() -> Promotion:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            digest = (await client.resolve(await full_name(client, model))).digest
            return await _waited(client, await client.promote(name, digest), wait, timeout)

    _print_promotion(name, run_until_interrupted(say()))


def rollback(
    name: Name,
    steps: Annotated[int, typer.Option(min=1, help="Different models to go back.")] = 1,
    wait: Wait = True,
    timeout: Timeout = 600.0,
    registry: Registry = "",
) -> None:
    """Promote what an alias meant before.

    While a promotion is under way that is what the alias means still.
    """

    async def say() -> Promotion:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            return await _waited(client, await client.roll_back(name, steps=steps), wait, timeout)

    _print_promotion(name, run_until_interrupted(say()))


async def _waited(client: RegistryClient, promotion: Promotion, wait: bool, timeout_s: float) -> Promotion:
    """The promotion once it is through, where somebody waits for it."""
    wanted = promotion.deployment
    if not wait or wanted is None:
        return promotion
    if not wanted.settled:
        await wait_until_settled(client, wanted, timeout_s)
    aliases = {alias.name: alias for alias in await client.aliases()}
    return Promotion(aliases.get(wanted.alias), await client.deployment(wanted.alias))


def _print_promotion(name: str, promotion: Promotion) -> None:
    deployment, alias = promotion.deployment, promotion.alias
    if deployment is not None and not deployment.settled:
        result_console().print(
            f"{name} -> {deployment.targets[0].artifact_digest} as soon as a worker is ready"
            + (f"; it means {alias.artifact_digest} until then" if alias else "")
        )
    elif alias is not None:
        result_console().print(f"{name} -> {alias.artifact_digest}")


def history(name: Name, as_json: AsJson = False, registry: Registry = "") -> None:
    """Show where an alias has pointed, newest first."""

    async def look() -> list[Alias]:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            return await client.alias_history(name)

    entries = asyncio.run(look())
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2, default=_plain))
        return
    table = Table("SINCE", "MODEL", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(f"{entry.update_time:%Y-%m-%d %H:%M:%S} UTC", entry.artifact_digest or "(deleted)")
    result_console().print(table)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise invalid_field("value", f"cannot be printed: {value!r}")
