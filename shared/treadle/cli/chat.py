"""`treadle chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from treadle.cli.asking import (
    Address,
    MaxNewTokens,
    Model,
    Seed,
    Temperature,
    TopP,
    connected,
    served_model,
)
from treadle.cli.console import message_console, show_error, write_text
from treadle.client import Client, GenerationOptions, Message
from treadle.errors import TreadleError

_HELP = "Ctrl-C stops an answer, Ctrl-D leaves, /new starts over, /help says this again."


def chat(
    message: Annotated[
        str, typer.Option("--message", "-m", help="Ask this, print the answer and leave.", show_default=False)
    ] = "",
    system: Annotated[str, typer.Option(help="The system message.", show_default="the model's")] = "",
    model: Model = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    address: Address = "",
) -> None:
    """Talk to a model; answers stream as they are made.

    Ctrl-C stops the answer, not the conversation; Ctrl-D leaves. Without a terminal, each line of standard
    input is one message.

    Examples:

      treadle chat

      treadle chat --message "Name three weaving patterns." --temperature 0

      treadle chat --system "You answer in one sentence."
    """
    with connected(address) as client:
        options = GenerationOptions(
            model=served_model(client, model),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        opening = [Message("system", system)] if system else []
        if message:
            _, whole = _answer(client, [*opening, Message("user", message)], options)
            write_text("\n")
            if not whole:
                raise typer.Exit(130)
        else:
            _converse(client, opening, options)


def _converse(client: Client, opening: list[Message], options: GenerationOptions) -> None:
    interactive = sys.stdin.isatty()
    notes = message_console()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a history and arrow keys
        notes.print(f"{options['model']} at {client.address}. {_HELP}", style="dim")
    messages = list(opening)
    while True:
        try:
            asked = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            notes.print("\nCtrl-D leaves", style="dim")
            continue
        if asked == "/help":
            notes.print(_HELP, style="dim")
        elif asked == "/new":
            messages = list(opening)
        elif asked:
            messages = _turn(client, [*messages, Message("user", asked)], options)


def _turn(client: Client, messages: list[Message], options: GenerationOptions) -> list[Message]:
    """Asks and shows the answer; gives the conversation to go on with."""
    try:
        text, whole = _answer(client, messages, options)
    except TreadleError as error:
        show_error(error)
        return messages[:-1]
    write_text("\n" if whole else " …\n")
    return [*messages, Message("assistant", text)]


def _answer(client: Client, messages: list[Message], options: GenerationOptions) -> tuple[str, bool]:
    """Streams one answer to standard output; its text, and whether it came to its end."""
    text = ""
    asked = options.copy()
    asked["messages"] = messages
    with client.stream(**asked) as stream:
        try:
            for chunk in stream:
                text += chunk.text
                write_text(chunk.text)
        except KeyboardInterrupt:
            return text, False
    return text, True
