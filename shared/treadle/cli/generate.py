"""`treadle generate`: continues a text."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from treadle.cli.asking import (
    Address,
    MaxNewTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    connected,
    served_model,
)
from treadle.cli.console import write_text


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    model: Model = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text. May be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
    address: Address = "",
) -> None:
    """Continue a text, as it is: without a chat template.

    Examples:

      treadle generate "The capital of France is" --max-new-tokens 8 --temperature 0

      treadle generate - < prompt.txt

      treadle generate "Colours: red," --stop "." --json
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    with connected(address) as client:
        stream = client.stream(
            text,
            model=served_model(client, model),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_strings=stop or (),
        )
        with stream:
            for chunk in stream:
                if not as_json:
                    write_text(chunk.text)
        if as_json:
            typer.echo(json.dumps(asdict(stream.answer), indent=2, ensure_ascii=False))
        else:
            write_text("\n")
