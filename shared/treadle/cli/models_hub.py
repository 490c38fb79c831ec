"""Options of `treadle models import` that belong to a hub."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from treadle.client import HubOptions, ModelSource
from treadle.errors import invalid_field

_PANEL = "From a hub"

Revision = Annotated[
    str,
    typer.Option(
        help="A branch, a tag or a commit.", show_default="main", rich_help_panel=_PANEL, metavar="REVISION"
    ),
]
Variant = Annotated[
    str,
    typer.Option(
        help="Of the weight files: fp16 takes model.fp16.safetensors.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
GgufFile = Annotated[
    str,
    typer.Option(
        "--gguf-file",
        help="The GGUF file to take.",
        show_default=False,
        rich_help_panel=_PANEL,
        metavar="NAME",
    ),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="From the registry's hub cache alone.", rich_help_panel=_PANEL),
]


def with_hub_options(source: ModelSource, options: HubOptions) -> ModelSource:
    """The source with what the options say; raises InvalidArgument where that fits no source like it."""
    if options == HubOptions():
        return source
    if source.kind != "hub":
        raise invalid_field(
            "source", "--revision, --variant, --gguf-file and --offline belong to a hub: give hub:OWNER/NAME"
        )
    if options.revision and source.hub.revision:
        raise invalid_field("revision", f"{source} has one already; give it once")
    return replace(source, hub=replace(options, revision=options.revision or source.hub.revision))
