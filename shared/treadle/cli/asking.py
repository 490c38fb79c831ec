"""What `generate` and `chat` share: their options, the model to ask, a client that is known to be there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from treadle.cli.locate import credentials, gateway_address
from treadle.client import Client
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
    address = gateway_address(address)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise invalid_field("address", f'must be "host:port"; got {address!r}')
    shown = credentials()
    if not asyncio.run(is_healthy(address, "liveness", shown)):
        raise Unavailable(
            f"no gateway answers at {address}" + (" with TLS" if shown.tls else ", in plain text")
        )
    with Client(address, credentials=shown) as client:
        yield client


def served_model(client: Client, given: str) -> str:
    """`given`, or the one model that is served; raises FailedPrecondition when it is not plain which."""
    if given:
        return given
    names = sorted({model.name for model in client.models()})
    if len(names) == 1:
        return names[0]
    if not names:
        raise FailedPrecondition(
            "no worker serves a model yet; `treadle status` shows what is loading", reason="NOTHING_SERVED"
        )
    raise FailedPrecondition(f"choose one with --model: {', '.join(names)}", reason="MODEL_NOT_CHOSEN")
