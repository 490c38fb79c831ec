"""Docstrings as help texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer


def add_command(app: typer.Typer, command: Callable[..., Any], name: str | None = None) -> None:
    """Adds a command whose help is its docstring, with each paragraph as one line that the terminal wraps."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(name, help="\n\n".join(_joined(paragraph) for paragraph in paragraphs))(command)


def _joined(paragraph: str) -> str:
    return paragraph if paragraph.startswith(" ") else " ".join(paragraph.split())
