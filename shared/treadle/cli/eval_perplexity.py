"""`treadle eval perplexity`: how surprised a served model is by a text."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.asking import Address, Model, connected_async, model_for
from treadle.cli.console import result_console
from treadle.cli.eval_windows import Surprise, Window, text_pieces, windows
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials, tokenizer_address
from treadle.cli.options import AsJson
from treadle.cli.task_progress import TaskProgress
from treadle.client import ScoreInput, ScoreRequest, ServedModel, TokenizerClient
from treadle.errors import DataLoss, FailedPrecondition, InvalidArgument, invalid_field

_WINDOW = 1024
_PIECE_BYTES = 2 << 20
_WAITING = 8

Tokenizer = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="The tokenizer.",
        show_default="TREADLE_TOKENIZER_ADDRESS, else the suite that runs here",
    ),
]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A text's ids, beginning with one that is not scored; `num_bytes` are those of the scored ones."""

    ids: Sequence[int]
    num_bytes: int
    tokenizer_digest: str


def perplexity(
    file: Annotated[Path, typer.Argument(help="Plain text in UTF-8.", show_default=False)],
    model: Model = "",
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens that the model sees at a time.", show_default="1024, or its limit"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that each next window scores.", show_default="half the window"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Only the text's first so many.", show_default="all")
    ] = None,
    as_json: AsJson = False,
    tokenizer: Tokenizer = "",
    address: Address = "",
) -> None:
    """Measure a served model's perplexity on a text.

    Every token is scored once, with as much context as the window leaves it: the first window scores all its
    tokens, each later one the next STRIDE. The text's first token is scored only after a token that the
    model's texts begin with; a model without one does not score it.

    Examples:

      treadle eval perplexity book.txt --model smollm2

      treadle eval perplexity book.txt --window 2048 --stride 1024 --max-tokens 32768 --json
    """
    try:
        # Not as text: that would change the line ends of what is measured.
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file} is no text in UTF-8: {error}") from error
    result = run_until_interrupted(
        _measure(text, model, window, stride, max_tokens, tokenizer_address(tokenizer), address)
    )
    if as_json:
        typer.echo(json.dumps(result))
        return
    console = result_console()
    console.print(f"perplexity     {result['perplexity']:.4f}")
    console.print(f"bits per byte  {result['bits_per_byte']:.4f}")
    console.print(
        f"{result['tokens']} tokens scored, {result['bytes']} bytes, nll {result['nll']:.3f}; window "
        f"{result['window']}, stride {result['stride']}; {result['tokens_per_second']:.1f} tokens/s",
        style="dim",
    )


async def _measure(
    text: str,
    model: str,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    tokenizer: str,
    address: str,
) -> dict[str, object]:
    async with (
        connected_async(address) as client,
        TokenizerClient(tokenizer, credentials=credentials()) as encoder,
    ):
        served = await client.models()
        model = model or model_for("score", served)
        window = _window(window, model, served)
        stride = stride or max(1, window // 2)
        tokens = await _tokens(encoder, text, model, max_tokens)
        planned = list(windows(len(tokens.ids), window, stride))
        progress = TaskProgress("windows")
        done = 0
        with progress.shown("perplexity", len(tokens.ids) - 1, lambda: done, quiet=False):
            sums: list[float] = []
            digest = ""
            outcomes = client.score_stream(_requests(tokens, planned, model), window=_WAITING)
            async with contextlib.aclosing(outcomes):
                async for item in outcomes:
                    # One window's error is the whole's: a part of a text has no perplexity.
                    answer, one = item.result(), planned[item.index]
                    logprobs = answer.scores[0].logprobs
                    if len(logprobs) != one.end - one.start:
                        raise DataLoss(
                            f"{len(logprobs)} log-probabilities came for {one.end - one.start} tokens",
                            reason="ANSWER_INCOMPLETE",
                        )
                    sums.append(-math.fsum(logprobs))
                    done += len(logprobs)
                    digest = answer.model_digest
                    progress.update(item.index + 1, 0, done)
        surprise = Surprise(done, math.fsum(sums), tokens.num_bytes)
    return {
        "perplexity": surprise.perplexity,
        "bits_per_byte": surprise.bits_per_byte,
        "nll": surprise.nll,
        "tokens": surprise.tokens,
        "bytes": surprise.num_bytes,
        "window": window,
        "stride": stride,
        "model": model,
        "model_digest": digest,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(done / progress.seconds, 1),
    }


def _window(given: int | None, model: str, served: Sequence[ServedModel]) -> int:
    longest = max((one.max_model_len for one in served if model in (one.name, one.digest)), default=0)
    if given is None:
        return min(_WINDOW, longest) if longest else _WINDOW
    if longest and given > longest:
        raise invalid_field("window", f"must be at most the model's longest, {longest} tokens; got {given}")
    return given


async def _tokens(encoder: TokenizerClient, text: str, model: str, max_tokens: int | None) -> _Tokens:
    """The text's ids; behind the token that the model's texts begin with, where it has one."""
    marked, plain = [
        (await encoder.encode(["a"], model=model, add_special_tokens=special)).token_ids[0]
        for special in (True, False)
    ]
    first = list(marked[: marked.index(plain[0])]) if plain and plain[0] in marked else []
    ids: list[int] = []
    digest = ""
    for piece in text_pieces(text, _PIECE_BYTES):
        encoded = await encoder.encode([piece], model=model, add_special_tokens=False)
        ids += encoded.token_ids[0]
        digest = encoded.tokenizer_digest
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    whole = max_tokens is None or len(ids) <= max_tokens
    ids = ids[:max_tokens]
    if len(ids) + len(first[-1:]) < 2:
        raise FailedPrecondition("the text has no token to score: it is too short", reason="TEXT_TOO_SHORT")
    scored = ids if first else ids[1:]
    if whole and first:
        num_bytes = len(text.encode())
    elif whole:
        (unscored,) = await encoder.decode([ids[:1]], model=model, skip_special_tokens=False)
        num_bytes = len(text.encode()) - _num_bytes(unscored)
    else:
        (said,) = await encoder.decode([scored], model=model, skip_special_tokens=False)
        num_bytes = _num_bytes(said)
    return _Tokens([*first[-1:], *ids], num_bytes, digest)


def _num_bytes(decoded: str) -> int:
    # Half a character is decoded as a replacement, which is longer than what it stands for.
    return len(decoded.replace("\ufffd", "?").encode())


def _requests(tokens: _Tokens, planned: Sequence[Window], model: str) -> Iterator[ScoreRequest]:
    for one in planned:
        given = ScoreInput(
            tokens.ids[one.begin : one.start], tokens.ids[one.start : one.end], tokens.tokenizer_digest
        )
        yield ScoreRequest(inputs=[given], model=model)
