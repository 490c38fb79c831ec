"""What commands that ask a gateway share: options, the model to ask, a client that is known to be there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Annotated

import typer

from treadle.cli.locate import credentials, gateway_address
from treadle.client import AsyncClient, Client, Credentials, ServedModel
from treadle.errors import FailedPrecondition, Unavailable, invalid_field
from treadle.local.probe import is_healthy

Address = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="The gateway.",
        show_default="TREADLE_ADDRESS, else the suite that runs here",
    ),
]
Model = Annotated[
    str, typer.Option(help="An alias or a digest.", show_default="the one that is served", metavar="NAME")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 takes the likeliest token.", show_default="the model's")
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest tokens of this probability together.", show_default="the model's"),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, help="Keep this many likeliest tokens; 0: all.", show_default="the model's"),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes the draws repeatable.", show_default="drawn")]


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the gateway; raises Unavailable at once when nobody listens there."""
    found, shown = asyncio.run(_reachable(address))
    with Client(found, credentials=shown) as client:
        yield client


@contextlib.asynccontextmanager
async def connected_async(address: str) -> AsyncIterator[AsyncClient]:
    """The same on an event loop."""
    found, shown = await _reachable(address)
    async with AsyncClient(found, credentials=shown) as client:
        yield client


async def _reachable(address: str) -> tuple[str, Credentials]:
    address, shown = gateway_address(address), credentials()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise invalid_field("address", f'must be "host:port"; got {address!r}')
    if not await is_healthy(address, "liveness", shown):
        raise Unavailable(
            f"no gateway answers at {address}" + (" with TLS" if shown.tls else ", in plain text")
        )
    return address, shown


def served_model(client: Client, given: str) -> str:
    """`given`, or the one model that is served; raises FailedPrecondition when it is not plain which."""
    return given or model_for("generate", client.models())


def model_for(task: str, models: Iterable[ServedModel]) -> str:
    """The one served model that can do a task; raises FailedPrecondition when it is not plain which."""
    served = {model.name: model.tasks for model in models}
    # A gateway of an older release does not say what its models can do.
    names = sorted(name for name, tasks in served.items() if not tasks or task in tasks)
    if len(names) == 1:
        return names[0]
    if not served:
        raise FailedPrecondition(
            "no worker serves a model yet; `treadle status` shows what is loading", reason="NOTHING_SERVED"
        )
    if not names:
        able = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in sorted(served.items()))
        raise FailedPrecondition(
            f"no served model can {task}; what they can: {able}", reason="TASK_NOT_SUPPORTED"
        )
    raise FailedPrecondition(f"choose one with --model: {', '.join(names)}", reason="MODEL_NOT_CHOSEN")
