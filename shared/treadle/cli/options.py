"""Options that several commands of the registry have."""

from __future__ import annotations

from typing import Annotated

import typer

Registry = Annotated[
    str,
    typer.Option(
        "--registry",
        metavar="HOST:PORT",
        help="The registry.",
        show_default="TREADLE_REGISTRY_ADDRESS, else the suite that runs here",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
