"""`treadle classify`: texts to labels."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import asdict
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
    Truncate,
    WithText,
    is_given,
    run_task,
)
from treadle.cli.task_records import text_fields, texts
from treadle.cli.task_run import Task
from treadle.cli.task_tables import show_labels
from treadle.client import Classifications, ClassifyRequest
from treadle.client.task_request import Text
from treadle.errors import invalid_field


def classify(
    text: Texts = None,
    pair: Annotated[
        str | None, typer.Option(help="The second sentence of the one text.", show_default=False)
    ] = None,
    file: File = None,
    line_format: Format = None,
    out: Out = None,
    with_text: WithText = False,
    as_json: AsJson = False,
    model: Model = "",
    multi_label: Annotated[
        bool | None,
        typer.Option(
            "--multi-label/--single-label",
            help="Each label by itself, or one among all.",
            show_default="the model's",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the best labels.", show_default="all")
    ] = None,
    truncate: Truncate = False,
    batch_size: BatchSize = 32,
    address: Address = "",
) -> None:
    """Label texts, or pairs of sentences, with probabilities.

    Lines of a file or of standard input become JSONL, one line each in their order; a bad line fails alone.
    JSONL has records of text and, where wanted, pair.

    Examples:

      treadle classify "What a lovely day"

      treadle classify "A man sleeps." --pair "Nobody is awake."

      treadle classify --file reviews.txt --top-k 1 --out labels.jsonl
    """

    def make(name: str) -> Task[Text, Classifications]:
        async def requests(batches: AsyncIterable[Sequence[Text]]) -> AsyncIterator[ClassifyRequest]:
            async for batch in batches:
                yield ClassifyRequest(
                    texts=batch, model=name, multi_label=multi_label, top_k=top_k, truncate=truncate
                )

        return Task(
            "classify",
            texts(),
            lambda client, batches, window: client.classify_stream(requests(batches), window=window),
            _rows,
            text_fields,
            show_labels,
        )

    given: list[Text] | None = list(text or ()) if is_given(text, file) else None
    if pair is not None:
        if given is None or len(given) != 1:
            raise invalid_field("pair", "belongs to one text that is an argument; lines have it in JSONL")
        given = [(str(given[0]), pair)]
    lines = Lines(file, line_format, out, with_text, as_json, batch_size)
    run_task(make, given, lines, task_name="classify", model=model, address=address)


def _rows(answer: Classifications) -> Iterator[dict[str, object]]:
    for labels in answer.labels:
        yield {"labels": [asdict(one) for one in labels]}
