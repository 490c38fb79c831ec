"""`treadle tag`: texts to labelled spans."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Literal

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
from treadle.cli.task_records import single_texts, text_fields
from treadle.cli.task_run import Task
from treadle.cli.task_tables import show_spans
from treadle.client import TaggedTexts, TagRequest
from treadle.client.task_request import Text


def tag(
    text: Texts = None,
    file: File = None,
    line_format: Format = None,
    out: Out = None,
    with_text: WithText = False,
    as_json: AsJson = False,
    model: Model = "",
    aggregation: Annotated[
        Literal["none", "simple", "first", "max"] | None,
        typer.Option(help="How tokens become spans.", show_default="simple"),
    ] = None,
    include_outside: Annotated[
        bool, typer.Option("--include-outside", help='Keep spans of the label "O".')
    ] = False,
    truncate: Truncate = False,
    batch_size: BatchSize = 32,
    address: Address = "",
) -> None:
    """Mark the parts of texts that have a label: names, places, what the model knows.

    Lines of a file or of standard input become JSONL, one line each in their order; a bad line fails alone.
    start and end count characters of the line's text.

    Examples:

      treadle tag "Ada Lovelace lived in London."

      treadle tag --file news.txt --aggregation max --out spans.jsonl
    """

    def make(name: str) -> Task[Text, TaggedTexts]:
        async def requests(batches: AsyncIterable[Sequence[Text]]) -> AsyncIterator[TagRequest]:
            async for batch in batches:
                yield TagRequest(
                    texts=batch,
                    model=name,
                    aggregation=aggregation,
                    truncate=truncate,
                    include_outside=include_outside,
                )

        return Task(
            "tag",
            single_texts(),
            lambda client, batches, window: client.tag_stream(requests(batches), window=window),
            _rows,
            text_fields,
            show_spans,
        )

    given: list[Text] | None = list(text or ()) if is_given(text, file) else None
    lines = Lines(file, line_format, out, with_text, as_json, batch_size)
    run_task(make, given, lines, task_name="tag", model=model, address=address)


def _rows(answer: TaggedTexts) -> Iterator[dict[str, object]]:
    for spans in answer.spans:
        yield {"spans": [asdict(one) for one in spans]}
