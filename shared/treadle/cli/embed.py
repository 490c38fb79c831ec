"""`treadle embed`: texts to vectors."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
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
from treadle.cli.task_tables import show_embeddings
from treadle.client import Embeddings, EmbedRequest
from treadle.client.task_request import Text


def embed(
    text: Texts = None,
    file: File = None,
    line_format: Format = None,
    out: Out = None,
    with_text: WithText = False,
    as_json: AsJson = False,
    model: Model = "",
    pooling: Annotated[
        Literal["mean", "cls", "last"] | None,
        typer.Option(help="How tokens become a vector.", show_default="the model's"),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="To length 1.", show_default="the model's"),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(min=1, help="Keep the first so many numbers.", show_default="all")
    ] = None,
    prompt: Annotated[
        str,
        typer.Option("--prompt-name", help="A prompt of the model's folder.", show_default="its default one"),
    ] = "",
    truncate: Truncate = False,
    batch_size: BatchSize = 32,
    address: Address = "",
) -> None:
    """Make vectors of texts.

    Lines of a file or of standard input become JSONL, one line each in their order; a bad line fails alone.
    JSONL has records of text.

    Examples:

      treadle embed "A loom" "A weaving machine"

      treadle embed --file sentences.txt --out vectors.jsonl

      cat sentences.txt | treadle embed - --model minilm --dimensions 128
    """

    def make(name: str) -> Task[Text, Embeddings]:
        async def requests(batches: AsyncIterable[Sequence[Text]]) -> AsyncIterator[EmbedRequest]:
            async for batch in batches:
                yield EmbedRequest(
                    texts=batch,
                    model=name,
                    pooling=pooling,
                    normalize=normalize,
                    dimensions=dimensions,
                    prompt_name=prompt,
                    truncate=truncate,
                )

        return Task(
            "embed",
            single_texts(),
            lambda client, batches, window: client.embed_stream(requests(batches), window=window),
            _rows,
            text_fields,
            show_embeddings,
        )

    given: list[Text] | None = list(text or ()) if is_given(text, file) else None
    lines = Lines(file, line_format, out, with_text, as_json, batch_size)
    run_task(make, given, lines, task_name="embed", model=model, address=address)


def _rows(answer: Embeddings) -> Iterator[dict[str, object]]:
    for row in answer.rows:
        # Nine digits are all that float32 has.
        yield {"embedding": [float(f"{number:.9g}") for number in row]}
