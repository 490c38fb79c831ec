"""`treadle eval`: what served models are worth, measured through the suite."""

from __future__ import annotations

import typer

from treadle.cli.eval_multiple_choice import multiple_choice
from treadle.cli.eval_perplexity import perplexity
from treadle.cli.help import add_command


def build_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(
        help="Measure served models, through the suite.", no_args_is_help=True, rich_markup_mode="rich"
    )
    add_command(app, perplexity)
    add_command(app, multiple_choice, "multiple-choice")
    return app
