"""`treadle score`: how likely a model finds a text."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from typing import Annotated

import typer

from treadle.cli.asking import Address, Model
from treadle.cli.task_command import (
    AsJson,
    BatchSize,
    File,
    Format,
    Lines,
    Out,
    Texts,
    WithText,
    is_given,
    run_task,
)
from treadle.cli.task_records import scored
from treadle.cli.task_run import Task
from treadle.cli.task_tables import show_scores
from treadle.client import ScoreRequest, Scores

Pair = tuple[str, str]


def score(
    text: Texts = None,
    context: Annotated[
        str,
        typer.Option(help="The text before, where a line has none of its own.", show_default=False),
    ] = "",
    file: File = None,
    line_format: Format = None,
    out: Out = None,
    with_text: WithText = False,
    as_json: AsJson = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Every token's id and log-probability, too.")
    ] = False,
    model: Model = "",
    batch_size: BatchSize = 16,
    address: Address = "",
) -> None:
    """Say how likely a text is after a context: its natural log-probability.

    Without a context the token that the model's texts begin with stands for it. Lines of a file or of
    standard input become JSONL, one line each in their order; a bad line fails alone. JSONL has records of
    continuation and context.

    Examples:

      treadle score " Paris" " Rome" --context "The capital of France is"

      treadle score --file pairs.jsonl --out scores.jsonl
    """

    def make(name: str) -> Task[Pair, Scores]:
        async def requests(batches: AsyncIterable[Sequence[Pair]]) -> AsyncIterator[ScoreRequest]:
            async for batch in batches:
                yield ScoreRequest(inputs=batch, model=name)

        return Task(
            "score",
            scored(context),
            lambda client, batches, window: client.score_stream(requests(batches), window=window),
            lambda answer: _rows(answer, tokens),
            lambda pair: {"context": pair[0], "continuation": pair[1]},
            show_scores,
        )

    given = [(context, one) for one in text or ()] if is_given(text, file) else None
    lines = Lines(file, line_format, out, with_text, as_json, batch_size)
    run_task(make, given, lines, task_name="score", model=model, address=address)


def _rows(answer: Scores, tokens: bool) -> Iterator[dict[str, object]]:
    for one in answer.scores:
        row: dict[str, object] = {
            "logprob": one.total_logprob,
            "num_tokens": len(one.token_ids),
            "greedy": one.greedy,
        }
        if tokens:
            row |= {"token_ids": one.token_ids, "logprobs": [float(f"{each:.9g}") for each in one.logprobs]}
        yield row
