"""The `treadle` command: puts the subcommands together and turns errors into messages."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from treadle import __version__
from treadle.cli import evaluate, keys, models
from treadle.cli.chat import chat
from treadle.cli.classify import classify
from treadle.cli.console import show_error, tolerate_any_text
from treadle.cli.demo import demo
from treadle.cli.embed import embed
from treadle.cli.generate import generate
from treadle.cli.help import add_command
from treadle.cli.rerank import rerank
from treadle.cli.score import score
from treadle.cli.status import status
from treadle.cli.tag import tag
from treadle.cli.up import up
from treadle.errors import FailedPrecondition, TreadleError

_HELP = """Serve transformer models as a suite of gRPC services.

Start here:

  treadle demo             every service, an answer, 8 prompts at once

  treadle up               the same suite, left running

  treadle chat             talk to it

  treadle models import    bring in a model of your own

Commands find a suite that runs on this machine by themselves; `--address` or TREADLE_ADDRESS names another.
"""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


def build_app() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(
        help=_HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True),
        ] = False,
    ) -> None:
        pass

    add_command(app, demo)
    add_command(app, up)
    add_command(app, status)
    add_command(app, chat)
    add_command(app, generate)
    for command in (embed, classify, tag, rerank, score):
        add_command(app, command)
    app.add_typer(evaluate.build_app(), name="eval")
    app.add_typer(models.build_app(), name="models")
    app.add_typer(keys.build_app(), name="keys")
    return app


def main() -> None:
    """The entry point: exits 0 when all went well, 1 at an error, 2 at a wrong call, 130 at Ctrl-C."""
    tolerate_any_text()
    try:
        build_app()(prog_name="treadle")
    except TreadleError as error:
        show_error(error)
        sys.exit(1)
    except OSError as error:
        show_error(FailedPrecondition(str(error), reason="SYSTEM"))
        sys.exit(1)


if __name__ == "__main__":
    main()
