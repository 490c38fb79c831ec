"""`treadle status`: what runs, what is ready, what the engines do."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import Annotated

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.table import Table
from rich.text import Text

from treadle.api.worker.v1 import worker_pb2, worker_pb2_grpc
from treadle.cli.asking import Address
from treadle.cli.console import message_console, result_console
from treadle.cli.locate import addresses, credentials
from treadle.client import AsyncClient, ServedModel
from treadle.errors import TreadleError
from treadle.local.probe import is_healthy
from treadle.rpc import open_channel
from treadle.security import Credentials

_LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A service's health."""

    name: str
    address: str
    live: bool
    ready: bool


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, address: Address = ""
) -> None:
    """Show every service's health, the served models and what they can do, and the engines' figures.

    Exits 0 when everything is ready, else 1.
    """
    services, models, engines = asyncio.run(_look(addresses(address), credentials()))
    if as_json:
        report = {
            "services": [asdict(service) for service in services],
            "models": [asdict(model) for model in models],
            "workers": engines,
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(services, models, engines)
    if not all(service.ready for service in services):
        raise typer.Exit(1)


async def _look(
    where: dict[str, str],
    shown: Credentials,
) -> tuple[list[ServiceStatus], list[ServedModel], dict[str, dict[str, object]]]:
    services = await asyncio.gather(*(_health(name, at, shown) for name, at in where.items()))
    live = {service.name for service in services if service.live}
    models: list[ServedModel] = []
    if "gateway" in live:
        async with AsyncClient(where["gateway"], credentials=shown) as client:
            try:
                models = await client.models()
            except TreadleError as error:
                message_console().print(f"the gateway does not list models: {error.message}")
    workers = [name for name in where if name.startswith("worker") and name in live]
    figures = await asyncio.gather(*(_engines(where[name], shown) for name in workers))
    return list(services), models, dict(zip(workers, figures, strict=True))


async def _health(name: str, address: str, shown: Credentials) -> ServiceStatus:
    live, ready = await asyncio.gather(
        is_healthy(address, "liveness", shown), is_healthy(address, credentials=shown)
    )
    return ServiceStatus(name, address, live, ready)


async def _engines(address: str, shown: Credentials) -> dict[str, object]:
    """The worker's status by the contract's names."""
    async with open_channel(address, shown) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            response = await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=_LOOK_S)
        except grpc.aio.AioRpcError:
            return {}
    return MessageToDict(
        response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _show(
    services: list[ServiceStatus], models: list[ServedModel], workers: dict[str, dict[str, object]]
) -> None:
    console = result_console()
    table = Table("SERVICE", "ADDRESS", "LIVE", "READY", box=None, pad_edge=False)
    for service in services:
        table.add_row(service.name, service.address, _word(service.live), _word(service.ready))
    console.print(table)
    if models:
        table = Table("MODEL", "DIGEST", "PROFILE", "CONTEXT", "WORKERS", "TASKS", box=None, pad_edge=False)
        for model in models:
            table.add_row(
                model.name,
                model.digest[:19],
                model.profile,
                str(model.max_model_len),
                str(model.ready_workers),
                ", ".join(model.tasks) or "-",
            )
        console.print()
        console.print(table)
        for model in models:
            if model.error:
                console.print(Text.assemble((f"{model.name} is not served: ", "red"), model.error))
    rows = [(name, profile) for name, worker in workers.items() for profile in _profiles(worker)]
    if rows:
        headings = ("WORKER", "MODEL", "RUNNING", "WAITING", "FREE BLOCKS", "STEPS", "TOKENS", "PREFIX HITS")
        table = Table(*headings, box=None, pad_edge=False)
        for name, profile in rows:
            engine = profile.get("engine", {})
            loaded = profile.get("profile", {})
            num_blocks = loaded.get("num_kv_blocks", 0)
            # An encoder has no cache.
            free = f"{engine.get('num_free_blocks', 0)} of {num_blocks}" if num_blocks else "-"
            hits = f"{engine.get('prefix_cache_hits', 0)} of {engine.get('prefix_cache_queries', 0)}"
            table.add_row(
                name,
                str(loaded.get("model_name", "")),
                str(engine.get("num_requests_running", 0)),
                str(engine.get("num_requests_waiting", 0)),
                free,
                str(engine.get("num_steps", 0)),
                str(engine.get("num_output_tokens", 0)),
                hits if num_blocks else "-",
            )
        console.print()
        console.print(table)


def _profiles(worker: dict[str, object]) -> list[dict[str, dict[str, object]]]:
    profiles = worker.get("profiles", [])
    assert isinstance(profiles, list)
    return profiles


def _word(yes: bool) -> str:
    return "[green]yes[/]" if yes else "[red]no[/]"
